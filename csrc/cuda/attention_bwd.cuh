// attention_bwd:  dq, dk, dv of attention_fwd, from dout, q, k, v, o and lse
//
// P = exp(scale q k^T - lse)   delta = rowsum(dout o)   dS = scale P (dout v^T - delta)
// dv = P^T dout   dk = dS^T q   dq = dS k        shapes, dtypes and strides as attention_fwd
//
// Three kernels, one after the other. (1) delta, by the very mma that sums dout v^T: where a softmax has one term, o is
// v to the bit, and dS exactly zero. With log2(e) lse it waits in the first eight bytes of the query's row of dq, which
// nobody else needs before (3), or in a room of its own where a mask's second part adds to dq. (2) dk and dv: a block
// owns 128 keys of one head (64 for D > 64), and walks over the queries that see them by the mask's columns, 32 at a
// time: S^T = K Q^T and dP^T = V dO^T are summed in registers in which mma wants them as the left operand of dV += P^T
// dO and dK += dS^T Q. (3) dq: a block owns 128 queries and walks over keys as the forward pass does: S, dP, dQ += dS
// K. The other side's rows come by cp.async, the next 32 while these are multiplied.
//
// S and dP are computed twice: seven products of 2 D flops a score where five would do, the price of sums that no two
// blocks share. The alternative is dq in float, added to by every block of keys: by atomics, in any order, or in turns.
// B = 32, H = 8, T = 1024, D = 64 causal: 120 G flops (86 with five products), 135 with the tiles' own waste of 12 %.
// Bytes: dout and o for (1), dout, q, k, v for (2) and (3), three gradients: 13 tensors of 34 MB, 436 MB; the tensor
// cores bound it. Shared memory to registers, in an A100's bandwidth at its full mma rate: 3/4 in (2) and 5/6 in (3),
// but 5/4 in (2) where a warp has 16 rows, D > 64: there it binds. Two exp2 a score: 2/7 of the time at D = 64.
//
// With dropout, weights W = P / (1 - p) or 0: dv = W^T dout, and dS = scale (W dout v^T - P delta). They are drawn anew
// in (2) and in (3). In (2) a warp owns 16 keys for D = 64 already, in (3) 16 queries for D = 128: draws take
// registers.
//
// Refuses what attention_fwd refuses.
#pragma once
#include "attention.cuh"
#include "dropout.cuh"

namespace igpt {
namespace cuda {

using namespace attention;

constexpr int kStep = kTile / 2;  // rows of the other side at a time: S and dP of more would not fit the registers
// M: blocks of 16 rows that a warp owns, hence tiles that a block owns. Two, but where dk and dv fill the registers.
template <int D, class Drop>
constexpr int kQueriesM = D == 128 && Drop::kDrops ? 1 : 2;
template <int D, class Drop>
constexpr int kKeysM = D > 64 || (Drop::kDrops && D == 64) ? 1 : 2;
template <int M>
using Scores = float[M][kStep / 8][4];
template <int M, int D>
using Sums = float[M][D / 8][4];

// Two tiles of the block's own rows, two stages of the other side's rows, and in (2) of their stats.
template <int M, int D>
struct Shared {
  static constexpr int kOwnBytes = M * kTile * D * 2, kStepBytes = kStep * D * 2;
  static constexpr int kStats = 2 * kOwnBytes + 4 * kStepBytes, kBytes = kStats + 2 * kStep * int(sizeof(Stats));
  uint32_t base;
  __device__ uint32_t own(int which) const { return base + which * kOwnBytes; }
  __device__ uint32_t other(int which, int stage) const {
    return base + 2 * kOwnBytes + (2 * stage + which) * kStepBytes;
  }
};

// Half a tile that a block meets.
struct Step {
  Meeting<2> tile;
  int first;  // row within the tile
};

// Calls load(stage, row) for each 32 rows that a block meets, one step ahead, and body(stage, tile, first row within
// the tile, mask's number) where this thread's half of the block meets them.
template <class Load, class Body>
__device__ inline void walk(Line (&lines)[2], const int* tile, const int* mask, int half, Load load, Body body) {
  const auto advance = [&](Step& s) {
    s.first ^= kStep;
    return s.first || next(s.tile, lines, tile, mask);
  };
  Step step = {{}, kStep};
  bool more = advance(step);
  if (more) load(0, step.tile.index * kTile);
  ptx::cp_async_commit();
  for (int stage = 0; more; stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // these rows have come for all, and all have read those before, whose memory is next
    Step coming = step;
    more = advance(coming);
    if (more) load(stage ^ 1, coming.tile.index * kTile + coming.first);
    ptx::cp_async_commit();
    const int id = half ? step.tile.id[1] : step.tile.id[0];
    if (id != kNotMet) body(stage, step.tile.index, step.first, id);
    step = coming;
  }
  ptx::cp_async_wait<0>();
}

// A score becomes W, which is P times the weight that dropout gives it, and its dP becomes dS / scale.
__device__ inline void gradient(float& p, float& ds, const Stats& of, float scale2, float weight) {
  p = ptx::ex2(fmaf(p, scale2, -of.lse2));
  ds = p * (ds * weight - of.delta);
  p *= weight;
}

// Rows t.. of a warp's sums leave.
template <int M, int D, class T>
__device__ inline void store_rows(const PlacedHead<T>& out, int64_t t, int64_t end, const Sums<M, D>& sums,
                                  float factor, bool add) {
#pragma unroll
  for (int r = 0; r < 2 * M; ++r)
    if (const int64_t at = t + 8 * r + threadIdx.x % 32 / 4; at < end)
      leave_row<D>(out.row(at), sums[r / 2], r % 2 * 2, factor, add ? 1.f : 0.f);
}

// ---- (1) stats: a warp owns 16 queries, and finds their sums on the diagonal of dO O^T ----

template <int D, class T>
__global__ void __launch_bounds__(kThreads) attention_stats_kernel(PlacedHeads<T> stats,       // [B, H, Tq, 4 or D]
                                                                   PlacedHeads<const T> dout,  // [B, H, Tq, D]
                                                                   PlacedHeads<const T> o,     // [B, H, Tq, D]
                                                                   const float* lse,           // [B, H, Tq]
                                                                   int Tq) {
  DYN_SMEM(unsigned char, memory);
  const uint32_t left = ptx::smem_u32(memory), right = left + kTile * D * 2;
  const int blocks = (Tq + kTile - 1) / kTile, bh = int(blockIdx.x / blocks);
  const int first = int(blockIdx.x % blocks) * kTile, warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  load_tile<D, kTile>(left, dout[bh], first, Tq);
  load_tile<D, kTile>(right, o[bh], first, Tq);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  float sums[1][2][4] = {};  // all 16 queries with the first eight of o, with the last eight
  add_scores<D, T>(sums, left, right, warp_row, warp_row);
  const int g = lane / 4;
  if (lane % 4 != g / 2) return;  // columns 2 (lane % 4) and the next are not row g
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (const int row = first + warp_row + g + 8 * h; row < Tq)
      *reinterpret_cast<Stats*>(stats[bh].row(row)) = {lse[int64_t(bh) * Tq + stats[bh].slot(row)] * kLog2e,
                                                       g % 2 ? sums[0][h][2 * h + 1] : sums[0][h][2 * h]};
}

// ---- (2) dk and dv ----

template <int D, class T, class Drop>
__global__ void __launch_bounds__(kThreads) attention_dkdv_kernel(PlacedHeads<T> dk,           // [B, H, Tk, D]
                                                                  PlacedHeads<T> dv,           // [B, H, Tk, D]
                                                                  PlacedHeads<const T> stats,  // [B, H, Tq, 4 or D]
                                                                  PlacedHeads<const T> dout,   // [B, H, Tq, D]
                                                                  PlacedHeads<const T> q,      // [B, H, Tq, D]
                                                                  PlacedHeads<const T> k,      // [B, H, Tk, D]
                                                                  PlacedHeads<const T> v,      // [B, H, Tk, D]
                                                                  Pattern pattern, float scale, bool add, Drop drop) {
  DYN_SMEM(unsigned char, memory);
  constexpr int M = kKeysM<D, Drop>, kOwn = M * kTile;
  const Shared<M, D> shared = {ptx::smem_u32(memory)};

  // Indices. Keys that most queries see come first in causal attention.
  const int blocks = (pattern.Tk + kOwn - 1) / kOwn;
  const int bh = int(blockIdx.x / blocks), block = int(blockIdx.x % blocks), lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * 16 * M, half = warp_row / kTile, j = M * block + half;
  Line lines[2] = {pattern.col(M * block), M == 2 ? pattern.col(M * block + 1) : Line{0, 0}};

  // The block's keys and values; queries, their gradients and stats come step by step.
  auto* const queries = reinterpret_cast<Dropout::Query*>(memory + Shared<M, D>::kBytes);
  load_tile<D, kOwn>(shared.own(0), k[bh], int64_t(block) * kOwn, pattern.Tk);
  load_tile<D, kOwn>(shared.own(1), v[bh], int64_t(block) * kOwn, pattern.Tk);
  const auto load = [&](int stage, int t) {
    load_tile<D, kStep>(shared.other(0, stage), q[bh], t, pattern.Tq);
    load_tile<D, kStep>(shared.other(1, stage), dout[bh], t, pattern.Tq);
    if (threadIdx.x >= kStep) return;
    const int row = t + threadIdx.x;
    const bool there = row < pattern.Tq;
    const int slot = stage * kStep + threadIdx.x;
    ptx::cp_async<sizeof(Stats)>(shared.base + Shared<M, D>::kStats + slot * int(sizeof(Stats)),
                                 stats[bh].row(there ? row : 0), there ? int(sizeof(Stats)) : 0);
    if constexpr (Drop::kDrops) queries[slot] = drop.drawn(bh, row);
  };

  // Steps.
  Sums<M, D> sums_k = {}, sums_v = {};
  const float scale2 = scale * kLog2e;
  walk(lines, pattern.col_tile, pattern.col_mask, half, load, [&](int stage, int i, int first, int id) {
    Scores<M> p = {}, ds = {};  // transposed: rows are keys
    add_scores<D, T>(p, shared.own(0), shared.other(0, stage), warp_row, 0);
    add_scores<D, T>(ds, shared.own(1), shared.other(1, stage), warp_row, 0);
    if (id != kWhole || !pattern.whole(i, j)) {
      const int row = warp_row % kTile + lane / 4;
      hide(p, first, [&](int r) { return pattern.col_bits(i, j, id, row + r); });
    }
    const Stats* of_step = reinterpret_cast<const Stats*>(memory + Shared<M, D>::kStats) + stage * kStep + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const Stats of[2] = {of_step[8 * n], of_step[8 * n + 1]};
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float weight = 1.f;
          if constexpr (Drop::kDrops)
            weight = drop.weight(queries[stage * kStep + 8 * n + lane % 4 * 2 + e % 2],
                                 j * kTile + warp_row % kTile + lane / 4, 16 * m + 8 * (e / 2));
          gradient(p[m][n][e], ds[m][n][e], of[e % 2], scale2, weight);
        }
    }
    add_mix<D, T>(sums_v, p, shared.other(1, stage), 0);
    add_mix<D, T>(sums_k, ds, shared.other(0, stage), 0);
  });

  const int64_t t = int64_t(block) * kOwn + warp_row;
  store_rows<M, D>(dk[bh], t, pattern.Tk, sums_k, scale, add);
  store_rows<M, D>(dv[bh], t, pattern.Tk, sums_v, 1.f, add);
}

// ---- (3) dq ----

template <int D, class T, class Drop>
__global__ void __launch_bounds__(kThreads)
    attention_dq_kernel(PlacedHeads<T> dq,           // [B, H, Tq, D]
                        PlacedHeads<const T> stats,  // [B, H, Tq, 4 or D], of dq too
                        PlacedHeads<const T> dout,   // [B, H, Tq, D]
                        PlacedHeads<const T> q,      // [B, H, Tq, D]
                        PlacedHeads<const T> k,      // [B, H, Tk, D]
                        PlacedHeads<const T> v,      // [B, H, Tk, D]
                        Pattern pattern, float scale, bool add, Drop drop) {
  DYN_SMEM(unsigned char, memory);
  constexpr int M = kQueriesM<D, Drop>, kOwn = M * kTile;
  const Shared<M, D> shared = {ptx::smem_u32(memory)};

  // Indices. The longest rows first.
  const int blocks = (pattern.Tq + kOwn - 1) / kOwn;
  const int bh = int(blockIdx.x / blocks), block = blocks - 1 - int(blockIdx.x % blocks), lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * 16 * M, half = warp_row / kTile, i = M * block + half;
  Line lines[2] = {pattern.row(M * block), M == 2 ? pattern.row(M * block + 1) : Line{0, 0}};

  // The block's queries, their gradients and stats; keys and values come step by step.
  load_tile<D, kOwn>(shared.own(0), q[bh], int64_t(block) * kOwn, pattern.Tq);
  load_tile<D, kOwn>(shared.own(1), dout[bh], int64_t(block) * kOwn, pattern.Tq);
  const auto load = [&](int stage, int t) {
    load_tile<D, kStep>(shared.other(0, stage), k[bh], t, pattern.Tk);
    load_tile<D, kStep>(shared.other(1, stage), v[bh], t, pattern.Tk);
  };
  const int64_t t = int64_t(block) * kOwn + warp_row;
  Stats of[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const int64_t at = t + 8 * r + lane / 4;
    of[r] = at < pattern.Tq ? *reinterpret_cast<const Stats*>(stats[bh].row(at)) : Stats{0.f, 0.f};
  }
  __syncwarp();  // all four lanes of a row have read it before any writes
  auto* const queries = reinterpret_cast<Dropout::Query*>(memory + Shared<M, D>::kBytes);
  if constexpr (Drop::kDrops)
    if (threadIdx.x < kOwn) queries[threadIdx.x] = drop.drawn(bh, block * kOwn + int(threadIdx.x));

  // Steps.
  Sums<M, D> sums = {};
  const float scale2 = scale * kLog2e;
  walk(lines, pattern.row_tile, pattern.row_mask, half, load, [&](int stage, int j, int first, int id) {
    Scores<M> p = {}, ds = {};
    add_scores<D, T>(p, shared.own(0), shared.other(0, stage), warp_row, 0);
    add_scores<D, T>(ds, shared.own(1), shared.other(1, stage), warp_row, 0);
    if (id != kWhole || !pattern.whole(i, j)) {
      const int row = warp_row % kTile + lane / 4;
      hide(p, first, [&](int r) { return pattern.row_bits(i, j, id, row + r); });
    }
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float weight = 1.f;
          if constexpr (Drop::kDrops)
            weight = drop.weight(queries[warp_row + 16 * m + 8 * (e / 2) + lane / 4], j * kTile + first + lane % 4 * 2,
                                 8 * n + e % 2);
          gradient(p[m][n][e], ds[m][n][e], of[2 * m + e / 2], scale2, weight);
        }
    add_mix<D, T>(sums, ds, shared.other(0, stage), 0);
  });

  store_rows<M, D>(dq[bh], t, pattern.Tq, sums, scale, add);
}

// stats: where (1) leaves what (2) and (3) need, [B, H, Tq, 4 or D].
template <class Drop>
void launch_bwd(const View& dq, const View& dk, const View& dv, const View& dout, const View& q, const View& k,
                const View& v, const View& o, const View& lse, const View& stats, const BlockMaskView& part,
                bool causal, float scale, bool add, const Drop& drop, Stream stream) {
  const int64_t Tq = q.size[2], Tk = k.size[2], heads = q.size[0] * q.size[1];
  const Pattern pattern(Tq, Tk, causal, part);
  by_head(q, [&]<class T, int D>() {
    const auto blocks = [&](int64_t tokens, int rows) { return unsigned(heads * ((tokens + rows - 1) / rows)); };
    const PlacedHeads<const T> of(stats, part), hdout(dout, part), hq(q, part), hk(k, part), hv(v, part);
    constexpr int M = kKeysM<D, Drop>, kKeys = M * kTile, kQueries = kQueriesM<D, Drop> * kTile;
    constexpr int kKeysBytes = Shared<M, D>::kBytes + query_bytes<Drop>(2 * kStep);
    constexpr int kQueriesBytes = Shared<kQueriesM<D, Drop>, D>::kBytes + query_bytes<Drop>(kQueries);
    allow_shared(attention_dkdv_kernel<D, T, Drop>, kKeysBytes);
    allow_shared(attention_dq_kernel<D, T, Drop>, kQueriesBytes);
    if (heads && Tq)
      LAUNCH((attention_stats_kernel<D, T>), blocks(Tq, kTile), kThreads, 4 * kTile * D, stream,
             PlacedHeads<T>(stats, part), hdout, PlacedHeads<const T>(o, part), lse.as<float>(), int(Tq));
    if (heads && Tk)
      LAUNCH((attention_dkdv_kernel<D, T, Drop>), blocks(Tk, kKeys), kThreads, kKeysBytes, stream,
             PlacedHeads<T>(dk, part), PlacedHeads<T>(dv, part), of, hdout, hq, hk, hv, pattern, scale, add, drop);
    if (heads && Tq)
      LAUNCH((attention_dq_kernel<D, T, Drop>), blocks(Tq, kQueries), kThreads, kQueriesBytes, stream,
             PlacedHeads<T>(dq, part), of, hdout, hq, hk, hv, pattern, scale, add, drop);
  });
}

inline void check_backward(const View& dq, const View& dk, const View& dv, const View& dout, const View& q,
                           const View& k, const View& v, const View& o, const View& lse, bool causal, float scale,
                           const MaskParts& mask) {
  check_attention(q, k, v, causal, scale, mask);
  check_heads(dq, q, "dq");
  check_heads(dk, q, "dk");
  check_heads(dv, q, "dv");
  check_heads(dout, q, "dout");
  check_heads(o, q, "o");
  const int64_t Tq = q.size[2], Tk = k.size[2], heads = q.size[0] * q.size[1];
  IGPT_CHECK(dq.size[2] == Tq && dout.size[2] == Tq && o.size[2] == Tq && dk.size[2] == Tk && dv.size[2] == Tk,
             "attention_bwd: gradients must be shaped like what they belong to");
  IGPT_CHECK(lse.dtype == DType::f32 && lse.dense() && lse.numel() == heads * Tq,
             "attention_bwd: lse must be dense float32 [B, H, Tq]");
  IGPT_CHECK(heads * ((std::max(Tq, Tk) + kTile - 1) / kTile) <= INT32_MAX, "attention: too many heads for one launch");
}

}  // namespace cuda
}  // namespace igpt
