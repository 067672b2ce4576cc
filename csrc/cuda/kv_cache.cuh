// A cache of keys and values as decoding kernels read it: rows in registers, elements of 16 bits or e4m3 with scales of
// pages, which slots a query sees, and what the launchers check.
#pragma once
#include "attention.cuh"

namespace igpt {
namespace cuda {
namespace decode {

using attention::Head;
using attention::Heads;

struct E4m3 {
  uint8_t bits;
};

// One head of a cache: strides of 32 bits in bytes, so that a row's address is one instruction.
struct Slots {
  const char* data;
  uint32_t stride;
  __device__ const char* operator[](int t) const { return data + uint64_t(uint32_t(t)) * stride; }
};
template <class E>
__device__ inline Slots slots_of(const Heads<const E>& heads, int bh) {
  const Head<const E> head = heads[bh];
  return {reinterpret_cast<const char*>(head.data), uint32_t(head.stride) * uint32_t(sizeof(E))};
}

constexpr int kTilesOfChunk = kDecodeChunk / kTile;

// ---- rows of a cache in registers ----

// Of a row of so many bytes each of `lanes` lanes has a share: pieces of 16 bytes while all get one, then of 8, then
// of 4. Where word w of lane `at` lies:
template <int bytes, int lanes>
__host__ __device__ constexpr int word_offset(int w, int at) {
  constexpr int kWide = bytes / (16 * lanes), kRest = bytes % (16 * lanes);
  if (w < 4 * kWide) return 16 * (w / 4 * lanes + at) + w % 4 * 4;
  const bool eights = kRest >= 8 * lanes;
  if (eights && w < 4 * kWide + 2) return 16 * lanes * kWide + 8 * at + (w - 4 * kWide) * 4;
  return (16 * kWide + (eights ? 8 : 0)) * lanes + 4 * at;
}
template <int bytes, int lanes>
__device__ inline void load_share(uint32_t (&words)[bytes / lanes / 4], const void* row, int at) {
  constexpr int kWide = bytes / (16 * lanes), kRest = bytes % (16 * lanes);
  const char* from = static_cast<const char*>(row);
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(from + word_offset<bytes, lanes>(4 * i, at)));
    words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
  }
  if constexpr (kRest >= 8 * lanes) {
    const uint2 x = __ldg(reinterpret_cast<const uint2*>(from + word_offset<bytes, lanes>(4 * kWide, at)));
    words[4 * kWide] = x.x, words[4 * kWide + 1] = x.y;
  }
  if constexpr (kRest % (8 * lanes) != 0) {
    constexpr int kLast = bytes / lanes / 4 - 1;
    words[kLast] = __ldg(reinterpret_cast<const uint32_t*>(from + word_offset<bytes, lanes>(kLast, at)));
  }
}

// Of four e4m3 in a word the even and the odd ones as f16, times 2^-8: a sign, four bits of exponent, three of
// mantissa.
__device__ inline uint32_t even_halves(uint32_t x) {
  return (x << 7 & 0x3f803f80u) | (x << 8 & 0x80008000u);
}
__device__ inline uint32_t odd_halves(uint32_t x) {
  return (x >> 1 & 0x3f803f80u) | (x & 0x80008000u);
}
constexpr float kHalvesScale = 256.f;  // what takes the 2^-8 back

// The lower (upper) 16 bits of two words.
__device__ inline uint32_t lower_of(uint32_t a, uint32_t b) {
  return (a & 0xffffu) | b << 16;
}
__device__ inline uint32_t upper_of(uint32_t a, uint32_t b) {
  return a >> 16 | (b & 0xffff0000u);
}

// ---- a call ----

// Scales of one head's pages, by page; ones where there are none.
struct Scales {
  const float* data;
  int64_t batch, head;
  int count;
  Scales(const View& v, int heads) : data(v.as<float>()), batch(v.stride[0]), head(v.stride[1]), count(heads) {}
  __device__ const float* operator[](int bh) const {
    return data ? data + int64_t(bh / count) * batch + int64_t(bh % count) * head : nullptr;
  }
};
template <class E>
struct Cache {
  Heads<const E> k, v;
  Scales k_scale, v_scale;
  const int* pages;  // of the sequence's tiles, or null: each is at its own place
  Cache(const View& k, const View& v, const View& ks, const View& vs, const View& pages = {})
      : k(k), v(v), k_scale(ks, int(k.size[1])), v_scale(vs, int(k.size[1])), pages(pages.as<int>()) {}
  // How far behind its slot of the sequence a tile's place is.
  __device__ int shift(int slot) const { return pages ? (__ldg(pages + slot / kTile) - slot / kTile) * kTile : 0; }
};
// How many slots of its own a query sees at most, and behind how many of a prefix they stand.
struct Lengths {
  const int* own;  // [B], or null: all have `most`
  int most, prefix;
  __device__ int operator[](int b) const { return own ? max(0, min(own[b], most)) : most; }
};

// ---- which slots a query sees ----

// Those of a tile of which `slots` are there.
__device__ inline uint64_t there(int slots) {
  return slots >= kTile ? ~0ull : slots <= 0 ? 0 : (1ull << slots) - 1;
}
struct Mask {
  const int *row_start, *row_tile, *row_mask;  // null: a query sees all
  const uint64_t* bits;
  int rows;
  explicit Mask(const BlockMaskView& m)
      : row_start(m.row_start.as<int>()), row_tile(m.row_tile.as<int>()), row_mask(m.row_mask.as<int>()),
        bits(m.bits.as<uint64_t>()), rows(int(m.row_start.numel()) - 1) {}

  // seen[t] &= what row `slot` sees of tile first + t, where seen[t] was 0 and clip(t) is there: thread `me` of many
  // looks at its share of the row's list.
  template <class Clip>
  __device__ void look(uint64_t* seen, int slot, int first, int count, int me, int threads, Clip clip) const {
    const int row = slot / kTile;
    if (slot < 0 || row >= rows) return;
    for (int e = row_start[row] + me; e < row_start[row + 1]; e += threads) {
      const int t = row_tile[e] - first, id = row_mask[e];
      if (t >= 0 && t < count) seen[t] = (id < 0 ? ~0ull : bits[int64_t(id) * kTile + slot % kTile]) & clip(t);
    }
  }
};

// ---- host ----

inline int64_t chunks_of(int64_t slots) {
  return (slots + kDecodeChunk - 1) / kDecodeChunk;
}

// Calls f.template operator()<E, D>(): q's dtype matters to a kernel where it is the cache's.
template <class F>
void by_cache(const View& q, const View& k, F f) {
  if (k.dtype == DType::e4m3) return attention::by_dim(q, [&]<int D>() { f.template operator()<E4m3, D>(); });
  attention::by_head(q, f);
}

inline void check_scales(const View& scale, const View& cache, const char* op) {
  IGPT_CHECK(cache.dtype == DType::e4m3 || !scale, "%s: scales are for e4m3 caches", op);
  if (cache.dtype != DType::e4m3) return;
  IGPT_CHECK(scale && scale.dtype == DType::f32 && scale.ndim == 3 && scale.size[0] == cache.size[0] &&
                 scale.size[1] == cache.size[1] && scale.size[2] == (cache.size[2] + kTile - 1) / kTile,
             "%s: an e4m3 cache needs scales, float32 [B, H, pages of %d slots]", op, kTile);
}
inline void check_side(const View& x, const View& like, const char* name, const char* op) {
  IGPT_CHECK(x.ndim == 4 && same_shape(x, like) && x.dtype == like.dtype && x.device == like.device,
             "%s: %s must be [B, H, T, D], both caches alike", op, name);
  const int bytes = x.dtype == DType::e4m3 ? 1 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && x.stride[i] * bytes % 16 == 0;
  IGPT_CHECK(x.numel() == 0 || aligned, "%s: rows of %s must begin at multiples of 16 bytes; copy it", op, name);
}
// k and v of a dtype that queries of q's can read.
inline void check_cache(const View& k, const View& v, const View& k_scale, const View& v_scale, const View& q,
                        const char* op) {
  IGPT_CHECK(q.dtype == DType::bf16 || q.dtype == DType::f16, "%s: bfloat16 or float16 only", op);
  IGPT_CHECK(q.ndim == 4 && q.size[3] % 32 == 0 && q.size[3] >= 32 && q.size[3] <= 128,
             "%s: expected [B, H, T, D] with a head dim of 32, 64, 96 or 128", op);
  IGPT_CHECK(k.ndim == 4 && k.size[1] == q.size[1] && k.size[3] == q.size[3] && k.device == q.device &&
                 (k.dtype == q.dtype || k.dtype == DType::e4m3),
             "%s: k must be [B, H, T, D] with q's heads, head dim and device, of q's dtype or e4m3", op);
  check_side(k, k, "k", op), check_side(v, k, "v", op);
  check_scales(k_scale, k, op), check_scales(v_scale, v, op);
  IGPT_CHECK(k.size[2] <= INT32_MAX / 2, "%s: the cache is too long", op);
  for (const View* x : {&k, &v})
    IGPT_CHECK(x->stride[2] >= 0 && x->stride[2] <= INT32_MAX, "%s: slots lie more than 2^31 elements apart", op);
}
inline void check_lengths(const View& lengths, int64_t batch, const char* op) {
  IGPT_CHECK(!lengths || (lengths.dtype == DType::i32 && lengths.dense() && lengths.numel() == batch),
             "%s: lengths must be dense int32 [B]", op);
}
inline void check_mask_rows(const BlockMaskView& mask, const View& q, int64_t slots, const char* op) {
  IGPT_CHECK(!mask.order, "%s: a mask is in raster order", op);
  if (!mask) return;
  IGPT_CHECK((mask.row_start.numel() - 1) * kTile >= slots, "%s: the mask has fewer rows than the cache slots", op);
  for (const View* list : {&mask.row_start, &mask.row_tile, &mask.row_mask})
    IGPT_CHECK(list->dtype == DType::i32 && list->dense() && list->device == q.device,
               "%s: mask lists must be dense int32 on q's device", op);
  IGPT_CHECK(mask.bits.dtype == DType::i64 && mask.bits.dense() && mask.bits.device == q.device,
             "%s: mask bits must be dense int64 words on q's device", op);
}
inline void check_partials(const View& partials, const View& q, const char* op) {
  IGPT_CHECK(partials.dtype == DType::f32 && partials.ndim == 4 && partials.dense() && partials.size[0] == q.size[0] &&
                 partials.size[1] == q.size[1] && partials.size[3] == q.size[3] + 2 &&
                 reinterpret_cast<uintptr_t>(partials.data) % alignof(float2) == 0,
             "%s: partials must be dense float32 [B, H, chunks, D + 2], at a multiple of 8 bytes", op);
}

}  // namespace decode
}  // namespace cuda
}  // namespace igpt
