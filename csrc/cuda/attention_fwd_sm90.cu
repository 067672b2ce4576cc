// attention_fwd on Hopper: formulas, shapes and refusals of attention_fwd.cu, for head dims 64, 96 and 128.
//
// A block owns 64 queries a warpgroup: two warpgroups and two blocks a multiprocessor for D = 64, else three and one.
// One thread beside them walks over the tiles of 64 keys that any of the warpgroups meets, and brings K and V by TMA
// into a ring of stages, with a note of which warpgroup sees how much of the tile.
//
// A warpgroup waits for nobody but the copies. S = Q K^T by wgmma m64n64k16; the online softmax in registers, where two
// rows belong to four lanes each; P, packed, is the left operand of O += P V from registers, with V read along its
// rows. For D > 64, P V and the next tile's Q K^T are queued together. The tensor cores work for the other warpgroups
// while one makes its exponentials. O is scaled only where a maximum has risen.
//
// Flops, bytes: those of attention_fwd.cu, with tiles of 64 x 64 on the diagonal: waste of 6 % at T = 1024. A score of
// D = 64 takes 1/16 cycle of the tensor cores, of exp2 at 16 a cycle, and 4.5 of 128 instructions a cycle: the first
// two are even, and four warpgroups share them. 128 queries read 16 KB of K and V a tile for 2.1 MFLOP at D = 64: 4
// TB/s of L2 at 500 TFLOP/s. Shared memory: 96 bytes a cycle at the full rate, of 128.
//
// sass attention_fwd_sm90_kernel<64, bf16>: HGMMA = 8, LOCAL = 0
// sass attention_fwd_sm90_kernel<128, bf16>: HGMMA = 12, LOCAL = 0
#include "attention_sm90.cuh"

namespace igpt {
namespace cuda {

using namespace attention;

namespace {

// Queries of a warpgroup stay, K and V come.
template <int D>
constexpr int kBytes = Panels<D>::kTileBytes;
template <int D>
using Shape = std::conditional_t<D == 64, Layout<2, kBytes<D>, 2, 4, 2 * kBytes<D>, 2, 104, 32>,
                                 Layout<3, kBytes<D>, 2, D == 96 ? 6 : 4, 2 * kBytes<D>, 1, 160, 32>>;

// Whether the next tile's scores are queued behind P V: P and S want registers side by side, which four warpgroups on a
// multiprocessor do not have, nor need.
template <int D>
constexpr bool kAhead = D > 64;

// Of the thread's two rows: the maximum of scale2 * score, and the sum of this thread's columns.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

// S becomes P, packed; O is faded where a maximum has risen.
template <int D, class T>
__device__ inline void softmax(Softmax& rows, Sums64<D>& o, Packed& p, const Scores64& s, float scale2) {
  float base[2], fade[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float tops[2] = {-INFINITY, -INFINITY};  // two chains are shorter than one
#pragma unroll
    for (int j = 0; j < kTile / 2; ++j)
      if (of_row(j) == r) tops[j % 2] = fmaxf(tops[j % 2], s[j]);
    float top = fmaxf(tops[0], tops[1]);
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = fmaxf(rows.top[r], top * scale2);
    base[r] = top == -INFINITY ? 0.f : top;  // a row that has seen nothing: all of P is exp2(-inf)
    fade[r] = ptx::ex2(rows.top[r] - base[r]);
    rows.top[r] = top;
    rows.sum[r] *= fade[r];
  }
  if (__any_sync(0xffffffffu, fade[0] != 1.f || fade[1] != 1.f)) {
#pragma unroll
    for (int j = 0; j < D / 2; ++j) o[j] *= fade[of_row(j)];
  }
#pragma unroll
  for (int j = 0; j < kTile / 2; j += 2) {
    const int r = of_row(j);
    const float x = ptx::ex2(fmaf(s[j], scale2, -base[r])), y = ptx::ex2(fmaf(s[j + 1], scale2, -base[r]));
    rows.sum[r] += x + y;
    p[j / 8][j / 2 % 4] = ptx::pack2<T>(x, y);
  }
}

template <int D, class T>
__global__ void __launch_bounds__(Shape<D>::kThreads, Shape<D>::kBlocks)
    attention_fwd_sm90_kernel(Heads<T> o,                             // [B, H, Tq, D]
                              float* lse,                             // [B, H, Tq]
                              const __grid_constant__ CUtensorMap q,  // [B, H, Tq, D]
                              const __grid_constant__ CUtensorMap k,  // [B, H, Tk, D]
                              const __grid_constant__ CUtensorMap v,  // [B, H, Tk, D]
                              Pattern pattern, Work work, float scale2) {
  using L = Shape<D>;
  ATTENTION_RING(L, ring);
  ring.begin();
  const int bh = work.head(), count = work.count();
  const auto first_tile = [&](int n) { return work.place(n, true) * L::kGroups; };  // the longest rows first

  if (threadIdx.x >= L::kMath) {
    const int head = bh % o.count, image = bh / o.count;
    bring_items(
        ring, count, first_tile, [&](int i) { return pattern.row(i); }, pattern.row_tile, pattern.row_mask,
        [&](uint32_t to, uint32_t bar, int i) { bring_tile<D>(to, &q, bar, i * kTile, head, image); },
        [&](uint32_t to, uint32_t bar, int j) { bring_two<D>(to, &k, &v, bar, j, head, image); });
    return;
  }

  ptx::reg_alloc<L::kMathRegisters>();
  const int group = threadIdx.x / 128;
  Met<L> tile;
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    const int i = first_tile(n) + group;
    const uint32_t own = ring.own(n, group);
    Scores64 s;
    Packed p;
    Sums64<D> sums = {};
    Softmax rows;
    ptx::mbar_wait(ring.own_full(n), 0);
    int held = -1;  // the stage of the product in flight
    const auto finish = [&] { finish_products(ring, held, sums); };
    if (find(tile, ring, group, finish)) {
      ptx::hold_registers(sums);
      start_scores<D, T>(s, own, ring.stage(tile.stage));
      for (;;) {
        ptx::wgmma_wait<0>();
        ptx::hold_registers(s);
        ptx::hold_registers(sums);
        if (held >= 0) ring.release(held);
        if (!pattern.whole(i, tile.index, tile.id))
          hide(s, [&](int r) { return pattern.row_bits(i, tile.index, tile.id, first_row() + 8 * r); });
        softmax<D, T>(rows, sums, p, s, scale2);
        start_mix<D, T>(sums, p, ring.stage(tile.stage) + kBytes<D>);
        held = int(tile.stage), tile.advance();
        if constexpr (!kAhead<D>) finish();
        if (!find(tile, ring, group, finish)) break;
        start_scores<D, T>(s, own, ring.stage(tile.stage));
      }
    }

    const int64_t t = int64_t(i) * kTile + first_row();
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = rows.sum[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[r] = sum == 0.f ? 0.f : 1.f / sum;
      if (threadIdx.x % 4 == 0 && t + 8 * r < pattern.Tq)
        lse[int64_t(bh) * pattern.Tq + t + 8 * r] = sum == 0.f ? kEmptyLse : (rows.top[r] + log2f(sum)) * kLn2;
    }
    store_rows<D>(o[bh], t, pattern.Tq, sums, inverse);
  }
}

}  // namespace

void attention_fwd_sm90(View o, View lse, View q, View k, View v, BlockMaskView mask, bool causal, float scale,
                        Stream stream) {
  by_head(q, [&]<class T, int D>() {
    if constexpr (D >= 64) {
      using L = Shape<D>;
      const Work work = Work::of<L>(q.size[0] * q.size[1], q.size[2]);
      allow_shared(attention_fwd_sm90_kernel<D, T>, L::kShared);
      LAUNCH((attention_fwd_sm90_kernel<D, T>), unsigned(q.size[0] * q.size[1] * work.blocks()), L::kThreads,
             L::kShared, stream, Heads<T>(o), lse.as<float>(), map_of<D>(q), map_of<D>(k), map_of<D>(v),
             Pattern(q.size[2], k.size[2], causal, mask), work, scale * kLog2e);
    }
  });
}

}  // namespace cuda
}  // namespace igpt
