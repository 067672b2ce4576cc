// attention_fwd on Hopper: formulas, shapes and refusals of attention_fwd.cu, for head dims 64, 96 and 128.
//
// A block has two warpgroups. Each owns two lines, tiles of 64 queries one below the other (one line for D > 64, whose
// registers are fewer, and where calls are so small that multiprocessors would be left without work). One thread beside
// them walks over the tiles of 64 keys that any line meets, and brings K and V by TMA into a ring of stages, with a
// note of which line sees how much of the tile. Blocks are as many as multiprocessors and take item after item: what
// the next one wants comes while this one ends.
//
// A warpgroup waits for nobody but the copies. S = Q K^T by wgmma m64n64k16 with Q in registers: from shared memory it
// would be read again for every tile, as many bytes as K. The online softmax is in registers, where two rows belong to
// four lanes each; P, packed, is the left operand of O += P V, with V read along its rows. Before a softmax the scores
// of the next one are queued: of the other line and the same tile, or of the next tile. So the tensor cores have work
// of the very warpgroup that makes exponentials, also when the others make theirs. Products in flight are not carried
// round the loop: the assembler does not follow them there, and would let each wait for the one before. A maximum may
// rise by 2^8 before O and the sums are scaled to it: P stays within what its type holds.
//
// Flops, bytes: those of attention_fwd.cu, with tiles of 64 x 64 on the diagonal: waste of 6 % at T = 1024. A score of
// D = 64 takes 1/16 cycle of the tensor cores, as much of exp2 at 16 a cycle, and 7.3 of 128 instructions a cycle, of
// which 4.5 are the softmax's own: the first two are even, and bind. A tile of K and V serves 256 queries at D = 64 (16
// KB for 4.2 MFLOP: 2 TB/s of L2 at 500 TFLOP/s) and 128 beyond, which is twice that. Shared memory: 64 bytes a cycle
// at the full rate, of 128.
//
// sass attention_fwd_sm90_kernel<64, 2, bf16>: HGMMA = 16, LOCAL = 0
// sass attention_fwd_sm90_kernel<64, 1, bf16>: HGMMA = 16, LOCAL = 0
// sass attention_fwd_sm90_kernel<128, 1, bf16>: HGMMA = 24, LOCAL = 0
#include "attention_sm90.cuh"

namespace igpt {
namespace cuda {

using namespace attention;

namespace {

// Queries stay, K and V come.
template <int D>
constexpr int kBytes = Panels<D>::kTileBytes;
template <int D, int lines>
using Shape = Layout<2, lines, kBytes<D>, 2,
                     D == 64   ? 8
                     : D == 96 ? 7
                               : 5,
                     2 * kBytes<D>, 1, 240, 24>;

constexpr float kRise = 8.f;  // how far a maximum may rise, as a power of two, before sums are scaled to it

// A line: its queries, and its sums. Of the thread's two rows: the maximum of scale2 * score, or what it was until it
// had risen by kRise, and the sum of this thread's columns.
template <int D>
struct Rows {
  Operand64<D> q;
  Sums64<D> o = {};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};
// S of a tile, and P while it is multiplied.
struct Weights {
  Scores64 s;
  Packed p;
};

template <int D>
__device__ inline void swap(Rows<D>& a, Rows<D>& b) {
  const Rows<D> c = a;
  a = b, b = c;
}

// S becomes P, packed. Before it touches O it calls settle(), which must wait for the product in flight into O.
template <int D, class T, class Settle>
__device__ inline void softmax(Rows<D>& rows, Weights& x, float scale2, Settle settle) {
  float top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float tops[2] = {-INFINITY, -INFINITY};  // two chains are shorter than one
#pragma unroll
    for (int j = 0; j < kTile / 2; ++j)
      if (of_row(j) == r) tops[j % 2] = fmaxf(tops[j % 2], x.s[j]);
    top[r] = fmaxf(tops[0], tops[1]);
    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2)) * scale2;
  }
  settle();
  if (__any_sync(0xffffffffu, top[0] > rows.top[0] + kRise || top[1] > rows.top[1] + kRise)) {
    float fade[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = rows.top[r];
      rows.top[r] = fmaxf(before, top[r]);
      fade[r] = rows.top[r] == -INFINITY ? 1.f : ptx::ex2(before - rows.top[r]);
      rows.sum[r] *= fade[r];
    }
#pragma unroll
    for (int j = 0; j < D / 2; ++j) rows.o[j] *= fade[of_row(j)];
  }
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) base[r] = rows.top[r] == -INFINITY ? 0.f : rows.top[r];  // all of P is exp2(-inf) then
#pragma unroll
  for (int j = 0; j < kTile / 2; j += 2) {
    const int r = of_row(j);
    const float a = ptx::ex2(fmaf(x.s[j], scale2, -base[r])), b = ptx::ex2(fmaf(x.s[j + 1], scale2, -base[r]));
    rows.sum[r] += a + b;
    x.p[j / 8][j / 2 % 4] = ptx::pack2<T>(a, b);
  }
}

template <int D, int lines, class T>
__global__ void __launch_bounds__(Shape<D, lines>::kThreads, Shape<D, lines>::kBlocks)
    attention_fwd_sm90_kernel(Heads<T> o,                             // [B, H, Tq, D]
                              float* lse,                             // [B, H, Tq]
                              const __grid_constant__ CUtensorMap q,  // [B, H, Tq, D]
                              const __grid_constant__ CUtensorMap k,  // [B, H, Tk, D]
                              const __grid_constant__ CUtensorMap v,  // [B, H, Tk, D]
                              Pattern pattern, Work work, float scale2) {
  using L = Shape<D, lines>;
  ATTENTION_RING(L, ring);
  ring.begin(q, k, v);
  if (threadIdx.x >= L::kMath) {
    bring_items(
        ring, work, [&](int i) { return pattern.row(i); }, pattern.row_tile, pattern.row_mask,
        [&](int i, int j) { return pattern.whole(i, j); },
        [&](uint32_t to, uint32_t bar, int i, int bh) {
          bring_tile<D>(to, &q, bar, i * kTile, bh % o.count, bh / o.count);
        },
        [&](uint32_t to, uint32_t bar, int j, int bh) {
          bring_two<D>(to, &k, &v, bar, j, bh % o.count, bh / o.count);
        });
    return;
  }

  ptx::reg_alloc<L::kMathRegisters>();
  Met<L> tile;
  each_item(ring, [&](uint32_t item, int group) {
    const auto tile_of = [&](int l) { return ring.item(item).place * L::kAll + group * L::kLines + l; };
    Rows<D> rows[L::kLines];
    Rows<D>&first = rows[0], &last = rows[L::kLines - 1];
    Weights a, b;
#pragma unroll
    for (int l = 0; l < L::kLines; ++l) take(rows[l].q, ring.own(item, group * L::kLines + l));
    const auto start = [&](Weights& x, const Rows<D>& of, const Met<L>& at) {
      start_scores<D, T>(x.s, of.q, ring.stage_of_warp(at.at()));
    };
    const auto mix = [&](Weights& x, Rows<D>& to, int l, auto settle) {
      ptx::hold_registers(x.s);
      if (!(l == 0 ? tile.whole[0] : tile.whole[L::kLines - 1])) {
        const Note<L>& note = ring.note(tile.at());
        const int i = tile_of(l), j = note.index, id = note.id[group * L::kLines + l];
        hide(x.s, [&](int r) { return pattern.row_bits(i, j, id, r); });
      }
      softmax<D, T>(to, x, scale2, settle);
      start_mix<D, T>(to.o, x.p, ring.stage_of_warp(tile.at()) + kBytes<D>);
    };
    const auto finish = [&] {
      ptx::wgmma_wait<0>();
      ptx::hold_registers(first.o);
      ptx::hold_registers(last.o);
    };
    const auto nothing = [] {};

    while (find(tile, ring, group)) {
      if (L::kLines == 2 && !all_of(tile)) {  // alone: one code for both lines, which trade places
        const int l = !tile.met[0];
        if (l) swap(first, last);
        ptx::hold_registers(first.o);
        start(a, first, tile);
        ptx::wgmma_wait<0>();
        mix(a, first, l, nothing);
        ptx::wgmma_wait<0>();
        ptx::hold_registers(first.o);
        if (l) swap(first, last);
      } else {
        ptx::hold_registers(first.o);
        ptx::hold_registers(last.o);
        start(a, first, tile);
        ptx::wgmma_wait<0>();
        for (;;) {  // `a` has the scores of the first line and this tile; no product is in flight
          Met<L> next = tile;
          bool more = true;
          if constexpr (L::kLines == 2) {
            start(b, last, tile);
          } else {
            next.advance();
            more = look(next, ring, group);
            start(b, last, more ? next : tile);  // where there is no next tile, scores that nobody will read
          }
          mix(a, first, 0, nothing);
          if (!more) {
            ptx::wgmma_wait<0>();  // here as well, or the assembler takes the products for unfinished
            break;
          }
          const uint32_t before = tile.at();
          tile = next;
          next.advance();
          more = look(next, ring, group) && all_of(next);
          start(a, first, more ? next : tile);
          ptx::wgmma_wait<L::kLines == 2 ? 1 : 2>();  // two lines leave no registers for two P
          mix(b, last, L::kLines - 1, [&] {
            if constexpr (L::kLines == 1) {
              ptx::wgmma_wait<1>();  // the same O
              ptx::hold_registers(first.o);
              ring.release(ring.full(before));
            }
          });
          finish();
          if (!more) break;
          ring.release(ring.full(tile.at()));
          tile = next;
        }
        finish();
      }
      ring.release(ring.full(tile.at()));
      tile.advance();
    }
#pragma unroll
    for (int l = 0; l < L::kLines; ++l) ptx::still_wanted(rows[l].q);

    const int bh = ring.item(item).head, i = tile_of(0);
    ring.release(ring.own_full(item));
    const auto leave = [&](const Rows<D>& x, int l) {
      const int64_t t = int64_t(i + l) * kTile + first_row(ptx::thread_again());
      float inverse[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = x.sum[r];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        inverse[r] = sum == 0.f ? 0.f : 1.f / sum;
        if (ptx::thread_again() % 4 == 0 && t + 8 * r < pattern.Tq)
          lse[int64_t(bh) * pattern.Tq + t + 8 * r] = sum == 0.f ? kEmptyLse : (x.top[r] + log2f(sum)) * kLn2;
      }
      store_rows<D>(o[bh], t, pattern.Tq, x.o, inverse);
    };
#pragma unroll
    for (int l = 0; l < L::kLines; ++l) leave(rows[l], l);
  });
}

}  // namespace

void attention_fwd_sm90(View o, View lse, View q, View k, View v, BlockMaskView mask, bool causal, float scale,
                        Stream stream) {
  const int64_t heads = q.size[0] * q.size[1], tiles = (q.size[2] + kTile - 1) / kTile;
  by_head(q, [&]<class T, int D>() {
    const auto run = [&]<int lines>() {
      using L = Shape<D, lines>;
      const Work work = Work::of<L>(heads, q.size[2], true, k.size[2] * 2 * D * int64_t(sizeof(T)));
      allow_shared(attention_fwd_sm90_kernel<D, lines, T>, L::kShared);
      const CUtensorMap mq = map_of<D>(q), mk = map_of<D>(k), mv = map_of<D>(v);  // a refused one before the launch
      LAUNCH((attention_fwd_sm90_kernel<D, lines, T>), work.blocks<L>(), L::kThreads, L::kShared, stream, Heads<T>(o),
             lse.as<float>(), mq, mk, mv, Pattern(q.size[2], k.size[2], causal, mask), work, scale * kLog2e);
    };
    if constexpr (D > 64) {
      run.template operator()<1>();
    } else if constexpr (D == 64) {
      // Of causal attention the longest item of two lines meets 4 tiles of keys a tile of the head, and all items of
      // all heads (tiles + 1) / 2. Where the former is by a quarter more than a multiprocessor's share, items are
      // halved.
      if (heads * (tiles + 1) * 5 >= 32 * Work::slots<Shape<D, 2>>())
        run.template operator()<2>();
      else
        run.template operator()<1>();
    }
  });
}

}  // namespace cuda
}  // namespace igpt
