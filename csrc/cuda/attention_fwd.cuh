// attention_fwd:  o = softmax(scale q k^T) v    lse = log sum exp(scale q k^T)    over [B, H, T, D] views
//
// q, k, v, o bf16 or f16, D 32, 64, 96 or 128, any strides that are multiples of eight elements   lse [B, H, Tq] f32.
//
// A block of four warps owns 128 queries of one head, each warp 32, and walks over the tiles of 64 keys that they see:
// S = Q K^T by mma m16n8k16, the online softmax in registers, O = O exp2(m_old - m) + P V with P still in the registers
// in which S was summed. K and V come by cp.async, the next tile while this one is multiplied, into rows whose chunks
// are swizzled for ldmatrix. The halves of a block are two rows of a mask: their lists are merged, and two warps rest
// where only the other half has a tile. The longest rows of a head are launched first. A query that sees no key gives
// o = 0 and lse = -1e30.
//
// Flops: 4 D a score, for B = 32, H = 8, T = 1024, D = 64 causal 34.4 G, 38.7 with the tiles' own waste of 12 %: the
// tensor cores bound it. Bytes: q, k, v, o once, 134 MB. Shared memory to registers: a fragment of 16 keys serves two
// products, 8 D bytes a 64-key step and row against 256 D flops: half of an A100's shared bandwidth at its full mma
// rate. One exp2 a score: 16 a clock and multiprocessor against 1024 multiply-adds: 1/2 of the time of a D = 64 score.
//
// With dropout P is multiplied, once its sum is known, by 1 / (1 - p) or 0, for nine instructions a score: integers,
// which the tensor cores do not wait for, but at D = 64 three times what the softmax's own arithmetic takes.
//
// Refuses: float32, other head dims, rows that do not begin at multiples of 16 bytes, a scale that is not positive.
#pragma once
#include "attention.cuh"
#include "dropout.cuh"

namespace igpt {
namespace cuda {

using namespace attention;

template <int D>
constexpr int kTilesBytes = (kRows + 4 * kTile) * D * 2;  // q, two of k, two of v

// What a warp has of its 32 queries: thread l has rows l / 4 + 8 i, i of 4.
template <int D>
struct Rows {
  float o[2][D / 8][4] = {};
  float top[4], sum[4] = {};  // of scale2 * score; sums of this thread's columns
  __device__ Rows() {
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i] = -INFINITY;
  }
};
// Keys at a time: all of a tile, or a part where wide rows of O leave no registers for more.
template <int D, class Drop>
constexpr int kStep = D <= 64 ? kTile : kTile / (D == 128 && Drop::kDrops ? 4 : 2);

// S becomes P; the rows' maximum, sum and O are brought up to date.
template <int D, int N>
__device__ inline void softmax(Rows<D>& rows, float (&s)[2][N][4], float scale2) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * m + half;
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top = fmaxf(rows.top[i], top * scale2);
      const float base = top == -INFINITY ? 0.f : top;  // a row that has seen nothing: all of P is exp2(-inf)
      const float fade = ptx::ex2(rows.top[i] - base);
      rows.top[i] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) sum += s[m][n][c] = ptx::ex2(fmaf(s[m][n][c], scale2, -base));
      rows.sum[i] = fmaf(rows.sum[i], fade, sum);
#pragma unroll
      for (int d = 0; d < D / 8; ++d) rows.o[m][d][2 * half] *= fade, rows.o[m][d][2 * half + 1] *= fade;
    }
}

// What is dropped of a warp's P becomes 0, the rest grows. of: what this thread draws with, key: its first column.
template <int M, int N>
__device__ inline void drop_some(float (&p)[M][N][4], const Dropout& drop, const Dropout::Query* of, uint32_t key) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Dropout::Query query = of[16 * m + 8 * half];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) p[m][n][2 * half + c] *= drop.weight(query, key, 8 * n + c);
    }
}

template <int D, class T, class Drop>
__global__ void __launch_bounds__(kThreads) attention_fwd_kernel(PlacedHeads<T> o,        // [B, H, Tq, D]
                                                                 float* lse,              // [B, H, Tq]
                                                                 PlacedHeads<const T> q,  // [B, H, Tq, D]
                                                                 PlacedHeads<const T> k,  // [B, H, Tk, D]
                                                                 PlacedHeads<const T> v,  // [B, H, Tk, D]
                                                                 Pattern pattern, float scale2, bool add, Drop drop) {
  DYN_SMEM(unsigned char, shared);
  constexpr int kKeys = kTile * D * 2;  // bytes of a tile
  const uint32_t shared_q = ptx::smem_u32(shared), shared_k = shared_q + kRows * D * 2, shared_v = shared_k + 2 * kKeys;

  // Indices.
  const int blocks = (pattern.Tq + kRows - 1) / kRows;
  const int bh = int(blockIdx.x / blocks);
  const int block = blocks - 1 - int(blockIdx.x % blocks);  // the longest rows first
  const int warp_row = threadIdx.x / 32 * kWarpRows, half = warp_row / kTile, i = 2 * block + half;
  Line lines[2] = {pattern.row(2 * block), pattern.row(2 * block + 1)};

  // The block's queries, and the first tile.
  const auto load = [&](int stage, int j) {
    load_tile<D, kTile>(shared_k + stage * kKeys, k[bh], int64_t(j) * kTile, pattern.Tk);
    load_tile<D, kTile>(shared_v + stage * kKeys, v[bh], int64_t(j) * kTile, pattern.Tk);
  };
  load_tile<D, kRows>(shared_q, q[bh], int64_t(block) * kRows, pattern.Tq);
  auto* const queries = reinterpret_cast<Dropout::Query*>(shared + kTilesBytes<D>);
  if constexpr (Drop::kDrops) queries[threadIdx.x] = drop.drawn(bh, block * kRows + int(threadIdx.x));
  Meeting<2> tile, coming;
  bool more = next(tile, lines, pattern.row_tile, pattern.row_mask);
  if (more) load(0, tile.index);
  ptx::cp_async_commit();

  // Tiles.
  Rows<D> rows;
  for (int stage = 0; more; stage ^= 1, tile = coming) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile has come for all, and all have read the one before, whose memory is next
    more = next(coming, lines, pattern.row_tile, pattern.row_mask);
    if (more) load(stage ^ 1, coming.index);
    ptx::cp_async_commit();
    const int id = half ? tile.id[1] : tile.id[0];
    if (id == kNotMet) continue;
    const bool whole = id == kWhole && pattern.whole(i, tile.index);
#pragma unroll 1
    for (int key = 0; key < kTile; key += kStep<D, Drop>) {
      float s[2][kStep<D, Drop> / 8][4] = {};
      add_scores<D, T>(s, shared_q, shared_k + stage * kKeys, warp_row, key);
      if (!whole) {
        const int first = warp_row % kTile + threadIdx.x % 32 / 4;
        hide(s, key, [&](int r) { return pattern.row_bits(i, tile.index, id, first + r); });
      }
      softmax(rows, s, scale2);
      if constexpr (Drop::kDrops) {
        const int lane = threadIdx.x % 32;
        drop_some(s, drop, queries + warp_row + lane / 4, tile.index * kTile + key + lane % 4 * 2);
      }
      add_mix<D, T>(rows.o, s, shared_v + stage * kKeys, key);
    }
  }
  ptx::cp_async_wait<0>();

  // What other keys gave is faded as the online softmax would.
  const PlacedHead<T> out = o[bh];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int lane = threadIdx.x % 32, m = r / 2, side = r % 2 * 2;
    const int64_t t = int64_t(block) * kRows + warp_row + 16 * m + 8 * (r % 2) + lane / 4;
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const bool here = t < pattern.Tq, first = lane % 4 == 0;
    float* row_lse = lse + int64_t(bh) * pattern.Tq + (here ? out.slot(t) : 0);
    const float before = __shfl_sync(0xffffffffu, add && here && first ? *row_lse : kEmptyLse, lane / 4 * 4);
    if (!here || (add && sum == 0.f)) continue;
    const float found = sum == 0.f ? kEmptyLse : (rows.top[r] + log2f(sum)) * kLn2;
    const float share = add ? 1.f / (1.f + expf(before - found)) : 1.f;  // of these keys in all of them
    leave_row<D>(out.row(t), rows.o[m], side, sum == 0.f ? 0.f : share / sum, 1.f - share);
    if (first) *row_lse = add ? fmaxf(before, found) + log1pf(expf(-fabsf(before - found))) : found;
  }
}

template <class Drop>
void launch_fwd(const View& o, const View& lse, const View& q, const View& k, const View& v, const BlockMaskView& part,
                bool causal, float scale, bool add, const Drop& drop, Stream stream) {
  const int64_t blocks = q.size[0] * q.size[1] * ((q.size[2] + kRows - 1) / kRows);
  if (blocks == 0) return;
  by_head(q, [&]<class T, int D>() {
    constexpr int kBytes = kTilesBytes<D> + query_bytes<Drop>(kRows);
    allow_shared(attention_fwd_kernel<D, T, Drop>, kBytes);
    LAUNCH((attention_fwd_kernel<D, T, Drop>), unsigned(blocks), kThreads, kBytes, stream, PlacedHeads<T>(o, part),
           lse.as<float>(), PlacedHeads<const T>(q, part), PlacedHeads<const T>(k, part), PlacedHeads<const T>(v, part),
           Pattern(q.size[2], k.size[2], causal, part), scale * kLog2e, add, drop);
  });
}

inline void check_forward(const View& o, const View& lse, const View& q, const View& k, const View& v, bool causal,
                          float scale, const MaskParts& mask) {
  check_attention(q, k, v, causal, scale, mask);
  check_heads(o, q, "o");
  IGPT_CHECK(o.size[2] == q.size[2] && lse.dtype == DType::f32 && lse.dense() && lse.numel() == q.numel() / q.size[3],
             "attention: o must be shaped like q and lse float32 [B, H, Tq]");
  IGPT_CHECK(q.size[0] * q.size[1] * ((q.size[2] + kRows - 1) / kRows) <= INT32_MAX,
             "attention: too many heads for one launch");
}

}  // namespace cuda
}  // namespace igpt
