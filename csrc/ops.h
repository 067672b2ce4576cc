// The contract between Python and the kernels: one struct of function pointers. A backend is a filled-in table.
//
// Rules that every field keeps: outputs come first, then incoming gradients, inputs, mask, scalars, stream. Nothing is
// allocated for the caller and nothing is remembered between calls. A View with data == nullptr is an absent optional
// tensor. Launchers check what they assume and throw std::invalid_argument. Same inputs, same bits.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#define IGPT_INLINED __attribute__((always_inline))  // a lambda
#define IGPT_INLINE IGPT_INLINED inline

namespace igpt {

enum class DType : int { f32, f16, bf16, f64, i64, i32, i16, u8, e4m3 };

// A tensor that somebody else owns. Strides count elements; the last dimension is contiguous.
struct View {
  void* data = nullptr;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};
  int ndim = 0;
  DType dtype = DType::f32;
  int device = -1;  // -1: the CPU, else the CUDA ordinal

  // Inlined by force: these stand in files compiled for newer processors, and the linker keeps one copy of a function.
  IGPT_INLINE explicit operator bool() const { return data != nullptr; }
  template <class T>
  IGPT_INLINE T* as() const {
    return static_cast<T*>(data);
  }
  IGPT_INLINE int64_t cols() const { return ndim ? size[ndim - 1] : 1; }
  IGPT_INLINE int64_t numel() const {
    int64_t n = data ? 1 : 0;  // the absent have nothing, as the empty
    for (int i = 0; i < ndim; ++i) n *= size[i];
    return n;
  }
  IGPT_INLINE int64_t rows() const { return cols() ? numel() / cols() : 0; }  // all but the last dimension, folded
  IGPT_INLINE bool dense() const {
    if (numel() == 0) return true;  // torch strides what is empty at will
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (size[i] != 1 && stride[i] != expected) return false;
      expected *= size[i];
    }
    return true;
  }
};

struct Stream {
  void* handle = nullptr;  // cudaStream_t; null on the CPU
};

// A sparse attention pattern, compiled: which 64 x 64 tiles exist and which bits of them are set.
// Rows (queries) list their tiles by increasing column (key tile) for the forward pass, columns list theirs by
// increasing row for the backward pass. A mask index of -1 is a full tile; else it names 64 words: bit k of bits[m][q]
// says whether query q sees key k, bit q of bits_t[m][k] the same seen from the key. With an order all of these count
// places, and order[p] is the slot that stands at place p: attention reads and writes rows where their slots lie.
constexpr int kTile = 64;
constexpr int kDecodeChunk = 2 * kTile;  // slots whose part of a decoding query's output is made by itself, always
struct BlockMaskView {
  View row_start, row_tile, row_mask;  // i32 [tiles + 1], i32 [entries], i32 [entries]
  View col_start, col_tile, col_mask;  // the same by columns
  View bits, bits_t;                   // i64 [masks, 64], the words of both directions
  View order;                          // i32 [T], absent: place p has slot p
  IGPT_INLINE explicit operator bool() const { return static_cast<bool>(row_start); }
};
// The parts of a mask, of which no two have a pair in common; none where there is no mask. Somebody else owns the list.
struct MaskParts {
  const BlockMaskView* part = nullptr;
  int64_t count = 0;
};

// The weights of a model's blocks, for the ops that run all of them: [d] norms, [3 d, d] qkv with q before k before v,
// [d, d], [m, d] and [d, m] linears, their biases or nothing. Somebody else owns the list.
struct LayerView {
  View ln_1, qkv, qkv_bias, attn_proj, attn_proj_bias, ln_2, fc, fc_bias, mlp_proj, mlp_proj_bias;
};
struct LayersView {
  const LayerView* layer = nullptr;
  int64_t count = 0;
};

// Who sees what in the layers' heads: head h of layer l looks through mask[of[l * groups + h % groups]], through none
// where that is -1. Without groups no head looks through any. Somebody else owns the lists.
struct MasksView {
  const BlockMaskView* mask = nullptr;
  int64_t count = 0;
  const int32_t* of = nullptr;  // [layers, groups]
  int64_t layers = 0, groups = 0;
};

struct Ops {
  const char* name = nullptr;

  // norm: y = s * rstd * weight with s = x (+ residual), rstd = 1 / sqrt(mean(s^2) + eps); dweight f32 [P, C],
  // row 0 of which receives the sum, the others are room for those of P groups of rows
  void (*rms_norm_fwd)(View y, View sum, View rstd, View x, View residual, View weight, float eps, Stream) = nullptr;
  void (*rms_norm_bwd)(View dx, View dresidual, View dweight, View dy, View dsum, View s, View weight, View rstd,
                       Stream) = nullptr;
  // activation: y = z * sigmoid(1.702 z) with z = x (+ bias); dbias f32 [P, C] as dweight
  void (*bias_quick_gelu_fwd)(View y, View x, View bias, Stream) = nullptr;
  void (*bias_quick_gelu_bwd)(View dx, View dbias, View dy, View x, View bias, Stream) = nullptr;
  // cross_entropy: loss = lse - logits[target], one value a row; a target out of range is refused where the host reads
  // it (the CPU), else the loss and the gradient of its row are NaN
  void (*cross_entropy_fwd)(View loss, View lse, View logits, View targets, Stream) = nullptr;
  void (*cross_entropy_bwd)(View dlogits, View dloss, View logits, View targets, View lse, Stream) = nullptr;
  // linear_cross_entropy: cross_entropy of hidden [N, C] weight [V, C]^T, logits never in memory, and its dlogits
  // [N, V rounded up to 8, zeros there] for as many rows as the caller has room for; a bad target gives NaN
  void (*linear_cross_entropy_fwd)(View loss, View lse, View hidden, View weight, View targets, Stream) = nullptr;
  void (*linear_cross_entropy_dlogits)(View dlogits, View dloss, View hidden, View weight, View targets, View lse,
                                       Stream) = nullptr;
  // attention: o = softmax(scale q k^T) v over [B, H, T, D] views; lse natural log, float32 [B, H, T]. room, [B, H, Tq,
  // 4] of q's dtype: where the CUDA kernels keep eight bytes a query if the mask has several parts
  void (*attention_fwd)(View o, View lse, View q, View k, View v, MaskParts mask, bool causal, float scale,
                        Stream) = nullptr;
  void (*attention_bwd)(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse, View room,
                        MaskParts mask, bool causal, float scale, Stream) = nullptr;
  // attention_dropout: the same, causal, with dropout(softmax(..), p); the seed and a weight's place decide whether it
  // is kept, as igpt_fast/reference/attention_dropout.py says. seed >= 0, p a multiple of 2^-24 in [0, 1)
  void (*attention_dropout_fwd)(View o, View lse, View q, View k, View v, float scale, float p, int64_t seed,
                                Stream) = nullptr;
  void (*attention_dropout_bwd)(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse,
                                float scale, float p, int64_t seed, Stream) = nullptr;
  // attention_decode: one query a head over the first `length` slots of a cache [B, H, T, D], of image b over the first
  // lengths[b] where lengths i32 [B] is given. k_scale, v_scale f32 [B, H, pages of kTile slots]: what the elements of
  // an e4m3 cache are multiplied with. pages i32 [tiles]: slot t is at pages[t / kTile] * kTile + t % kTile of k and v,
  // which hold what the mask still shows; without it, at t. mask: the query is row prefix + lengths[b] - 1. partials
  // f32 [B, H, chunks, D + 2]: o, maximum and sum of each kDecodeChunk slots: those of a shared prefix of so many
  // slots, which attention_prefix has made, then room for the cache's own, without which the sequence is not split over
  // blocks
  void (*attention_decode)(View o, View partials, View q, View k, View v, View k_scale, View v_scale, View lengths,
                           View pages, BlockMaskView mask, int64_t length, int64_t prefix, float scale,
                           Stream) = nullptr;
  // attention_prefix: the first partials of B queries over a prefix [M, H, P, D] that each B / M neighbours share
  void (*attention_prefix)(View partials, View q, View k, View v, View k_scale, View v_scale, View lengths,
                           BlockMaskView mask, int64_t length, float scale, Stream) = nullptr;
  // cache_append: k, v [B, H, n, D] into the slots from `slot`, or lengths[b], on. Scales of an e4m3 cache are powers
  // of two; where a page's must grow, what the page holds already is rounded anew
  void (*cache_append)(View k_cache, View v_cache, View k_scale, View v_scale, View k, View v, View lengths,
                       int64_t slot, Stream) = nullptr;
  // dropout: y = x / (1 - p) where an element is kept, else 0; the seed and its index decide, as
  // igpt_fast/reference/dropout.py says. seed and p as attention_dropout's
  void (*dropout)(View y, View x, float p, int64_t seed, Stream) = nullptr;
  // linear: y = (residual +) f(x weight^T (+ bias)) for the few rows of a decoding step, x by rms_norm where there is a
  // norm, f quick GELU or nothing; a row's bits do not depend on its neighbours
  void (*linear_fwd)(View y, View x, View weight, View bias, View norm, View residual, float eps, bool gelu,
                     Stream) = nullptr;
  // decode_step: one pixel more through all layers; logits [B, V], cache [L, B * 2 * H, T, D] with k before v, which
  // receives its slot, pixels i64 [B], wte [V, d], wpe [T, d], ln_f [d], wtet [V, d]; masks: the queries are row slot;
  // pages: as attention_decode's, and every head has a mask. prefix [L, M * 2 * H, P, D]: stands before the slots of
  // each B / M neighbours, whose cache then begins with slot P
  void (*decode_step)(View logits, View cache, View prefix, View pixels, View wte, View wpe, LayersView layers,
                      View ln_f, View wtet, View pages, MasksView masks, int64_t slot, float eps, Stream) = nullptr;
  // sampling: the token at which the distribution function of softmax(logits / temperature), cut to top_k (0: all) and
  // top_p (1: all), exceeds the uniform; -1 where the logits are not finite
  void (*sample_tokens)(View tokens, View logits, View uniforms, double temperature, int64_t top_k, double top_p,
                        Stream) = nullptr;
  // palette: nearest colour, lowest index on ties; one Lloyd step over weighted 8-bit colours: by token sums of
  // w u i64 [K, 3], of w i64 [K], of w |u|^2 i64 [K]; bad weights are refused where the host reads them, else inertia
  // is NaN. table i16 [2^24], optional: what palette_table has made of this palette
  void (*palette_assign)(View tokens, View pixels, View palette, View table, Stream) = nullptr;
  void (*kmeans_step)(View sums, View counts, View squares, View inertia, View colors, View weights, View palette,
                      View table, Stream) = nullptr;
  // the tokens of boxes first, first + 1, ... of 16^3 colours each, i16 [boxes, 4096] in the table's order
  void (*palette_table)(View table, View palette, int64_t first, Stream) = nullptr;
  // pixels u8 [N, 3] = colors u8 [K, 3] by token; bad i64 [1]: the first token out of range is at this index, or -1
  void (*palette_decode)(View pixels, View bad, View tokens, View colors, Stream) = nullptr;
  // adds to counts i64 [2^24], by r << 16 | g << 8 | b; workspace i16 [tiles, 16896], optional: where CUDA sorts that
  // many tiles of 16,384 pixels at a time
  void (*color_histogram)(View counts, View pixels, View workspace, Stream) = nullptr;
};

// Every field of Ops but its name: what walks over the ops (the bindings, the bench, the sanitizers' driver) has no
// list of its own.
// clang-format off
#define IGPT_EACH_OP(F) \
  F(rms_norm_fwd) F(rms_norm_bwd) \
  F(bias_quick_gelu_fwd) F(bias_quick_gelu_bwd) \
  F(cross_entropy_fwd) F(cross_entropy_bwd) \
  F(linear_cross_entropy_fwd) F(linear_cross_entropy_dlogits) \
  F(attention_fwd) F(attention_bwd) \
  F(attention_dropout_fwd) F(attention_dropout_bwd) \
  F(attention_decode) F(attention_prefix) F(cache_append) \
  F(dropout) \
  F(linear_fwd) \
  F(decode_step) \
  F(sample_tokens) \
  F(palette_assign) F(palette_table) F(palette_decode) \
  F(kmeans_step) F(color_histogram)
// clang-format on
#define IGPT_ONE_OP(field) +1
static_assert(sizeof(Ops) == (1 IGPT_EACH_OP(IGPT_ONE_OP)) * sizeof(void*), "a field of Ops is missing above");
#undef IGPT_ONE_OP

inline constexpr const char* kCpuTables[] = {"amx", "avx512_bf16", "avx512", "avx2", "baseline"};  // best first
const Ops* cpu_ops(const std::string& isa);       // nullptr: this machine cannot run that instruction set
std::string cpu_why_not(const std::string& isa);  // "" when it can
bool cpu_is_wide_amd();                           // AMD's, and twice as fast with AVX-512 as with AVX2
const Ops* cuda_ops();                            // nullptr: built without CUDA, or no driver for it
std::string cuda_why_not();                       // "" when there is a GPU, which asking makes start
std::string cuda_archs();                         // the architectures compiled in, "" without CUDA
bool cuda_takes_ptx();                            // whether the driver is as new as the compiler of the kernels' PTX
std::string cuda_versions();                      // of the runtime compiled in and of the newest that the driver runs

}  // namespace igpt
