// attention_bwd on Hopper: formulas, shapes and refusals of attention_bwd.cu, for head dims 64, 96 and 128.
//
// (1) stats, as there: delta on the diagonal of dO O^T, by the very wgmma that sums dO V^T, waits with log2(e) lse in
// the first eight bytes of the query's row of dq. (2) dk and dv: a warpgroup owns 64 keys, and queries come by TMA in
// tiles of 64, with dout and their stats. S^T = K Q^T and dP^T = V dO^T by wgmma; P^T and dS^T, packed, are the left
// operands of dV += P^T dO and dK += dS^T Q from registers. (3) dq: a warpgroup owns 64 queries, keys and values come:
// S = Q K^T, dP = dO V^T, dQ += dS K. What a warpgroup owns is in registers, if they are enough: from shared memory it
// would be read again for every tile. In both the products of the next tile are queued behind the last of this one, and
// P is made while dP is multiplied. No sum is shared between blocks, so no atomics, and the same bits always. Blocks:
// as many as multiprocessors, for item after item.
//
// B = 32, H = 8, T = 1024, D = 64 causal: 120 G flops, 128 with the tiles' own waste of 6 %, 162 us at 790 TFLOP/s; a
// score takes 7/32 cycle of the tensor cores and 2/16 of exp2. Bytes: those of attention_bwd.cu.
//
// sass attention_dkdv_sm90_kernel<64, bf16>: HGMMA = 16, LOCAL = 0
// sass attention_dq_sm90_kernel<64, bf16>: HGMMA = 12, LOCAL = 0
#include "attention_sm90.cuh"

namespace igpt {
namespace cuda {

using namespace attention;

namespace {

template <int D>
constexpr int kBytes = Panels<D>::kTileBytes;
constexpr int kStatsBytes = kTile * 16;  // sixteen bytes a row are the least that TMA brings
template <int D>
using KeysShape = Layout<2, 1, 2 * kBytes<D>, D == 128 ? 1 : 2, 4, 2 * kBytes<D> + kStatsBytes, 1, 240, 24>;
template <int D>
using QueriesShape = Layout<2, 1, 2 * kBytes<D>, 2,
                            D == 64   ? 8
                            : D == 96 ? 5
                                      : 3,
                            2 * kBytes<D>, 1, 240, 24>;

// Whether keys and values that a warpgroup owns are in registers, from which wgmma need not read them for every tile.
// Those of D > 64 find no room beside dk and dv.
template <int D>
constexpr bool kOwnKeys = D == 64;

// ---- (1) stats: a warpgroup owns 64 queries ----

template <int D, class T>
__global__ void __launch_bounds__(128)
    attention_stats_sm90_kernel(Heads<T> dq,                               // [B, H, Tq, D]
                                const __grid_constant__ CUtensorMap dout,  // [B, H, Tq, D]
                                const __grid_constant__ CUtensorMap o,     // [B, H, Tq, D]
                                const float* lse,                          // [B, H, Tq]
                                int Tq) {
  DYN_SMEM_1024(unsigned char, shared);
  STATIC_SMEM(uint64_t, bar, 1);
  const uint32_t tiles = ptx::smem_u32(shared), full = ptx::smem_u32(bar);
  const int blocks = (Tq + kTile - 1) / kTile, bh = int(blockIdx.x / blocks), tile = int(blockIdx.x % blocks);
  if (threadIdx.x == 0) {
    ptx::mbar_init(full, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(full, 2 * kBytes<D>);
    bring_two<D>(tiles, &dout, &o, full, tile, bh % dq.count, bh / dq.count);
  }
  __syncthreads();
  ptx::mbar_wait(full, 0);
  Scores64 s;
  start_scores<D, T>(s, tiles, tiles + kBytes<D>);
  ptx::wgmma_wait<0>();
  ptx::hold_registers(s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  if (lane % 4 != g / 2) return;  // columns 2 (lane % 4) and the next of eight are not row g's
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t delta = 0;  // its bits: an index that a warp knows only now would send s to memory
#pragma unroll
    for (int n = h; n < kTile / 8; n += 2)
      delta |= __float_as_uint(g % 2 ? s[4 * n + 2 * h + 1] : s[4 * n + 2 * h]) & (n == 2 * warp + h ? ~0u : 0u);
    if (const int row = tile * kTile + first_row(threadIdx.x) + 8 * h; row < Tq)
      *reinterpret_cast<Stats*>(dq[bh].row(row)) = {lse[int64_t(bh) * Tq + row] * kLog2e, __uint_as_float(delta)};
  }
}

// ---- (2) dk and dv ----

template <int D, class T>
__global__ void __launch_bounds__(KeysShape<D>::kThreads, 1)
    attention_dkdv_sm90_kernel(Heads<T> dk,                                // [B, H, Tk, D]
                               Heads<T> dv,                                // [B, H, Tk, D]
                               const __grid_constant__ CUtensorMap stats,  // [B, H, Tq, 8], of dq
                               const __grid_constant__ CUtensorMap dout,   // [B, H, Tq, D]
                               const __grid_constant__ CUtensorMap q,      // [B, H, Tq, D]
                               const __grid_constant__ CUtensorMap k,      // [B, H, Tk, D]
                               const __grid_constant__ CUtensorMap v,      // [B, H, Tk, D]
                               Pattern pattern, Work work, float scale) {
  using L = KeysShape<D>;
  ATTENTION_RING(L, ring);
  ring.begin(q, dout, stats, k, v);
  if (threadIdx.x >= L::kMath) {
    bring_items(
        ring, work, [&](int j) { return pattern.col(j); }, pattern.col_tile, pattern.col_mask,
        [&](int j, int i) { return pattern.whole(i, j); },
        [&](uint32_t to, uint32_t bar, int j, int bh) {
          bring_two<D>(to, &k, &v, bar, j, bh % dk.count, bh / dk.count);
        },
        [&](uint32_t to, uint32_t bar, int i, int bh) {
          const int head = bh % dk.count, image = bh / dk.count;
          bring_two<D>(to, &q, &dout, bar, i, head, image);
          ptx::tma_load(to + 2 * kBytes<D>, &stats, bar, 0, i * kTile, head, image);
        });
    return;
  }

  ptx::reg_alloc<L::kMathRegisters>();
  const float scale2 = scale * kLog2e;
  Met<L> tile;
  each_item(ring, [&](uint32_t item, int group) {
    const auto own_tile = [&] { return ring.item(item).place * L::kAll + group; };
    Own<D, kOwnKeys<D>> keys, values;
    take(keys, ring.own(item, group));
    take(values, ring.own(item, group) + kBytes<D>);
    Scores64 s, ds;  // transposed: rows are keys
    Packed p, g;
    Sums64<D> sums_k = {}, sums_v = {};
    const auto finish = [&] {
      ptx::wgmma_wait<0>();
      ptx::hold_registers(sums_v);
      ptx::hold_registers(sums_k);
    };
    while (find(tile, ring, group)) {
      int held = -1;  // the stage of the products in flight
      ptx::hold_registers(sums_k);
      ptx::hold_registers(sums_v);
      for (bool more = true; more;) {
        const uint32_t from = ring.stage_of_warp(tile.at());
        start_scores<D, T>(s, keys, from);
        start_scores<D, T>(ds, values, from + kBytes<D>);
        ptx::wgmma_wait<1>();
        ptx::hold_registers(s);
        ptx::hold_registers(sums_v);
        ptx::hold_registers(sums_k);
        if (held >= 0) ring.release(ring.full(held));
        if (!tile.whole[0]) {
          const Note<L>& note = ring.note(tile.at());
          const int i = note.index, j = own_tile(), id = note.id[group];
          hide(s, [&](int r) { return pattern.col_bits(i, j, id, r); });
        }
        // Of the thread's queries 8 n + e, e of 2, by 2 n + e: a row of the tile has 16 bytes, which hold two of these.
        const Stats* first =
            reinterpret_cast<const Stats*>(ring_shared + (from - ring.shared) + 2 * kBytes<D>) + threadIdx.x % 4 * 4;
        const auto of_tile = [&](int n) { return first[n / 2 * 16 + n % 2 * 2]; };
        Stats of[kTile / 4];
#pragma unroll
        for (int n = 0; n < kTile / 4; ++n) of[n] = of_tile(n);
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) s[i] = ptx::ex2(fmaf(s[i], scale2, -of[i / 4 * 2 + i % 2].lse2));
        pack<T>(p, s);
        start_mix<D, T>(sums_v, p, from + kBytes<D>);
        ptx::wgmma_wait<1>();
        ptx::hold_registers(ds);
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) {
          const int n = i / 4 * 2 + i % 2;  // at D = 128 there are no registers to keep it in
          ds[i] = s[i] * (ds[i] - (D < 128 ? of[n] : of_tile(n)).delta);
        }
        pack<T>(g, ds);
        start_mix<D, T>(sums_k, g, from);
        held = int(tile.at());
        tile.advance();
        if constexpr (D == 128) {  // the next scores and these packed ones want more registers than there are
          finish();
          ring.release(ring.full(held));
          held = -1;
        }
        more = look(tile, ring, group);
      }
      finish();
      if (held >= 0) ring.release(ring.full(held));
    }
    ptx::still_wanted(keys);
    ptx::still_wanted(values);
    const int bh = ring.item(item).head;
    const int64_t t = int64_t(own_tile()) * kTile + first_row(threadIdx.x);
    ring.release(ring.own_full(item));
    store_rows<D>(dk[bh], t, pattern.Tk, sums_k, {scale, scale});
    store_rows<D>(dv[bh], t, pattern.Tk, sums_v, {1.f, 1.f});
  });
}

// ---- (3) dq ----

template <int D, class T>
__global__ void __launch_bounds__(QueriesShape<D>::kThreads, 1)
    attention_dq_sm90_kernel(Heads<T> dq,                               // [B, H, Tq, D]: stats, then dq
                             const __grid_constant__ CUtensorMap dout,  // [B, H, Tq, D]
                             const __grid_constant__ CUtensorMap q,     // [B, H, Tq, D]
                             const __grid_constant__ CUtensorMap k,     // [B, H, Tk, D]
                             const __grid_constant__ CUtensorMap v,     // [B, H, Tk, D]
                             Pattern pattern, Work work, float scale) {
  using L = QueriesShape<D>;
  ATTENTION_RING(L, ring);
  ring.begin(dout, q, k, v);
  if (threadIdx.x >= L::kMath) {
    bring_items(
        ring, work, [&](int i) { return pattern.row(i); }, pattern.row_tile, pattern.row_mask,
        [&](int i, int j) { return pattern.whole(i, j); },
        [&](uint32_t to, uint32_t bar, int i, int bh) {
          bring_two<D>(to, &q, &dout, bar, i, bh % dq.count, bh / dq.count);
        },
        [&](uint32_t to, uint32_t bar, int j, int bh) {
          bring_two<D>(to, &k, &v, bar, j, bh % dq.count, bh / dq.count);
        });
    return;
  }

  ptx::reg_alloc<L::kMathRegisters>();
  const float scale2 = scale * kLog2e;
  Met<L> tile;
  each_item(ring, [&](uint32_t item, int group) {
    const int bh = ring.item(item).head, i = ring.item(item).place * L::kAll + group;
    const int64_t t = int64_t(i) * kTile + first_row(threadIdx.x);
    Stats of[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      of[r] = t + 8 * r < pattern.Tq ? *reinterpret_cast<const Stats*>(dq[bh].row(t + 8 * r)) : Stats{0.f, 0.f};
    __syncwarp();  // all four lanes of a row have read it before any writes
    Own<D, true> queries, douts;
    take(queries, ring.own(item, group));
    take(douts, ring.own(item, group) + kBytes<D>);
    Scores64 s, ds;
    Packed g;
    Sums64<D> sums = {};
    while (find(tile, ring, group)) {
      int held = -1;  // the stage of the product in flight
      ptx::hold_registers(sums);
      for (bool more = true; more;) {
        const uint32_t from = ring.stage_of_warp(tile.at());
        start_scores<D, T>(s, queries, from);
        start_scores<D, T>(ds, douts, from + kBytes<D>);
        ptx::wgmma_wait<1>();
        ptx::hold_registers(s);
        ptx::hold_registers(sums);
        if (held >= 0) ring.release(ring.full(held));
        if (!tile.whole[0]) {
          const Note<L>& note = ring.note(tile.at());
          const int j = note.index, id = note.id[group];
          hide(s, [&](int r) { return pattern.row_bits(i, j, id, r); });
        }
#pragma unroll
        for (int j = 0; j < kTile / 2; ++j) s[j] = ptx::ex2(fmaf(s[j], scale2, -of[of_row(j)].lse2));
        ptx::hold_registers(s);  // made here, while dP is multiplied
        ptx::wgmma_wait<0>();
        ptx::hold_registers(ds);
#pragma unroll
        for (int j = 0; j < kTile / 2; ++j) ds[j] = s[j] * (ds[j] - of[of_row(j)].delta);
        pack<T>(g, ds);
        start_mix<D, T>(sums, g, from);
        held = int(tile.at());
        tile.advance();
        more = look(tile, ring, group);
      }
      ptx::wgmma_wait<0>();
      ptx::hold_registers(sums);
      ring.release(ring.full(held));
    }
    ptx::still_wanted(queries);
    ptx::still_wanted(douts);
    ring.release(ring.own_full(item));
    store_rows<D>(dq[bh], t, pattern.Tq, sums, {scale, scale});
  });
}

// The first sixteen bytes of each row, and no more of it.
CUtensorMap map_of_stats(const View& x) {
  const auto stride = [&](int i) { return uint64_t(x.size[i] == 1 ? 8 : x.stride[i]); };
  const uint64_t size[4] = {8, uint64_t(x.size[2]), uint64_t(x.size[1]), uint64_t(x.size[0])};
  const uint64_t strides[3] = {stride(2), stride(1), stride(0)};
  const uint32_t box[4] = {8, kTile, 1, 1};
  return tensor_map<4>(x.data, x.dtype, size, strides, box, CU_TENSOR_MAP_SWIZZLE_NONE,
                       CU_TENSOR_MAP_L2_PROMOTION_NONE);
}

}  // namespace

void attention_bwd_sm90(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse,
                        BlockMaskView mask, bool causal, float scale, Stream stream) {
  const Pattern pattern(q.size[2], k.size[2], causal, mask);
  by_head(q, [&]<class T, int D>() {
    if constexpr (D >= 64) {
      using K = KeysShape<D>;
      using Q = QueriesShape<D>;
      const int64_t heads = q.size[0] * q.size[1], row = 2 * D * int64_t(sizeof(T));  // of two tensors
      // The longest are, in causal attention, the first keys and the last queries.
      const Work keys = Work::of<K>(heads, k.size[2], false, q.size[2] * row);
      const Work queries = Work::of<Q>(heads, q.size[2], true, k.size[2] * row);
      allow_shared(attention_dkdv_sm90_kernel<D, T>, K::kShared);
      allow_shared(attention_dq_sm90_kernel<D, T>, Q::kShared);
      const CUtensorMap mq = map_of<D>(q), mk = map_of<D>(k), mv = map_of<D>(v), mdout = map_of<D>(dout);
      const CUtensorMap mo = map_of<D>(o), mstats = map_of_stats(dq);  // a refused one before the launch
      LAUNCH((attention_stats_sm90_kernel<D, T>), unsigned(heads * pattern.nq), 128, 2 * kBytes<D>, stream,
             Heads<T>(dq), mdout, mo, lse.as<float>(), int(q.size[2]));
      LAUNCH((attention_dkdv_sm90_kernel<D, T>), keys.blocks<K>(), K::kThreads, K::kShared, stream, Heads<T>(dk),
             Heads<T>(dv), mstats, mdout, mq, mk, mv, pattern, keys, scale);
      LAUNCH((attention_dq_sm90_kernel<D, T>), queries.blocks<Q>(), Q::kThreads, Q::kShared, stream, Heads<T>(dq),
             mdout, mq, mk, mv, pattern, queries, scale);
    }
  });
}

}  // namespace cuda
}  // namespace igpt
