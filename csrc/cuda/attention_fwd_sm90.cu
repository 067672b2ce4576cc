// attention_fwd on Hopper: formulas, shapes and refusals of attention_fwd.cu, for head dims 64, 96 and 128.
//
// A block owns 64 queries a warpgroup: two warpgroups and two blocks a multiprocessor for D = 64, else three and one.
// One warp beside them walks over the tiles of 64 keys that any of the warpgroups meets, and brings K and V by TMA into
// a ring of stages, with a note of which warpgroup sees how much of the tile; one without bytes ends the walk.
//
// A warpgroup waits for nobody but the copies. S = Q K^T by wgmma m64n64k16; the online softmax in registers, where two
// rows belong to four lanes each; P, packed, is the left operand of O += P V from registers, with V read along its
// rows. P V and the next tile's Q K^T are queued together, so that a warpgroup waits once a tile, and the tensor cores
// work for the others while it makes its exponentials. O is scaled only where a maximum has risen.
//
// Flops, bytes: those of attention_fwd.cu, with tiles of 64 x 64 on the diagonal: waste of 6 % at T = 1024. A score of
// D = 64 takes 1/16 cycle of the tensor cores, of exp2 at 16 a cycle, and 4.5 of 128 instructions a cycle: the first
// two are even, and four warpgroups share them. 128 queries read 16 KB of K and V a tile for 2.1 MFLOP at D = 64: 4
// TB/s of L2 at 500 TFLOP/s. Shared memory: 96 bytes a cycle at the full rate, of 128.
#include "attention.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace igpt {
namespace cuda {

using namespace attention;

namespace {

template <int D>
struct Layout {
  static constexpr int kGroups = D == 64 ? 2 : 3;  // warpgroups of 64 queries
  static constexpr int kBlocks = D == 64 ? 2 : 1;  // of a multiprocessor
  static constexpr int kMath = 128 * kGroups, kThreads = kMath + 128;
  static constexpr int kMathRegisters = D == 64 ? 112 : 160, kOtherRegisters = 32;
  static constexpr int kStages = D == 64 ? 4 : D == 96 ? 6 : 5;
  // A tile of 64 rows is panels side by side, as wide as a swizzle that divides D.
  static constexpr int kPanel = D % 64 ? 32 : 64, kSpan = 2 * kPanel, kPanelBytes = kTile * kSpan;
  static constexpr int kTileBytes = kTile * D * 2;
  static constexpr int kShared = (kGroups + 2 * kStages) * kTileBytes;
  static constexpr ptx::Swizzle kSwizzle = D % 64 ? ptx::Swizzle::b64 : ptx::Swizzle::b128;
};

// Shared memory, and the mbarriers that say which stages are full and which are empty.
template <int D>
struct Ring {
  using L = Layout<D>;
  uint32_t q, bars;
  __device__ uint32_t q_full() const { return bars; }
  __device__ uint32_t full(uint32_t step) const { return bars + 8 + step % L::kStages * 16; }
  __device__ uint32_t empty(uint32_t step) const { return full(step) + 8; }
  __device__ static uint32_t phase(uint32_t step) { return step / L::kStages % 2; }
  __device__ uint32_t q_of(int group) const { return q + group * L::kTileBytes; }
  __device__ uint32_t k(uint32_t step) const { return q_of(L::kGroups) + step % L::kStages * 2 * L::kTileBytes; }
  __device__ uint32_t v(uint32_t step) const { return k(step) + L::kTileBytes; }
};

constexpr int kNoMore = -1;  // the index of a note that ends the walk
constexpr uint32_t kNone = ~0u;

// ---- copies ----

template <int D>
__device__ inline void load_head_tile(uint32_t to, const CUtensorMap* map, uint32_t bar, int t, int head, int image) {
#pragma unroll
  for (int p = 0; p < D / Layout<D>::kPanel; ++p)
    ptx::tma_load(to + p * Layout<D>::kPanelBytes, map, bar, p * Layout<D>::kPanel, t, head, image);
}

template <int D, int N>
__device__ inline void bring(const Ring<D>& ring, Meeting<N>* notes, const CUtensorMap* q, const CUtensorMap* k,
                             const CUtensorMap* v, const Pattern& pattern, int block, int head, int image) {
  using L = Layout<D>;
  Line lines[N];
#pragma unroll
  for (int g = 0; g < N; ++g) lines[g] = pattern.row(N * block + g);
  ptx::mbar_arrive_expect_tx(ring.q_full(), N * L::kTileBytes);
#pragma unroll
  for (int g = 0; g < N; ++g) load_head_tile<D>(ring.q_of(g), q, ring.q_full(), (N * block + g) * kTile, head, image);
  for (uint32_t step = 0;; ++step) {
    Meeting<N> tile;
    const bool more = next(tile, lines, pattern.row_tile, pattern.row_mask);
    if (!more) tile.index = kNoMore;
    ptx::mbar_wait(ring.empty(step), ring.phase(step) ^ 1u);
    notes[step % L::kStages] = tile;
    if (!more) return ptx::mbar_arrive(ring.full(step));
    ptx::mbar_arrive_expect_tx(ring.full(step), 2 * L::kTileBytes);
    load_head_tile<D>(ring.k(step), k, ring.full(step), tile.index * kTile, head, image);
    load_head_tile<D>(ring.v(step), v, ring.full(step), tile.index * kTile, head, image);
  }
}

// ---- a warpgroup's 64 queries ----

// Register j of S: row of_row(j) of the thread's two, 8 apart, column 8 (j / 4) + 2 (lane % 4) + j % 2.
using Scores = float[kTile / 2];
__device__ constexpr int of_row(int j) {
  return j / 2 % 2;
}

template <int D, class T>
__device__ inline void start_scores(Scores& s, const Ring<D>& ring, int group, uint32_t step) {
  using L = Layout<D>;
  const uint64_t a = ptx::matrix_descriptor(ring.q_of(group), 16, 8 * L::kSpan, L::kSwizzle);
  const uint64_t b = ptx::matrix_descriptor(ring.k(step), 16, 8 * L::kSpan, L::kSwizzle);
  ptx::wgmma_fence();
#pragma unroll
  for (int d = 0; d < D; d += 16) {  // descriptors count in 16 bytes
    const int at = (d / L::kPanel * L::kPanelBytes + d % L::kPanel * 2) / 16;
    ptx::wgmma<kTile, T>(s, a + at, b + at, d > 0);
  }
}

template <int D, class T>
__device__ inline void start_mix(float (&o)[D / 2], const uint32_t (&p)[kTile / 16][4], const Ring<D>& ring,
                                 uint32_t step) {
  using L = Layout<D>;
  const uint64_t b = ptx::matrix_descriptor(ring.v(step), L::kPanelBytes, 8 * L::kSpan, L::kSwizzle);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kTile / 16; ++i) ptx::wgmma<D, T, 1>(o, p[i], b + i * 16 * L::kSpan / 16, 1);
}

// -inf where bits(0 or 1, the thread's row) does not have a column's bit.
template <class Bits>
__device__ inline void hide(Scores& s, Bits bits) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint64_t seen = bits(r) >> (threadIdx.x % 4 * 2);
#pragma unroll
    for (int j = 0; j < kTile / 2; ++j)
      if (of_row(j) == r && !(seen >> (j / 4 * 8 + j % 2) & 1)) s[j] = -INFINITY;
  }
}

// Of the thread's two rows: the maximum of scale2 * score, and the sum of this thread's columns.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

// S becomes P, packed; O is faded where a maximum has risen.
template <int D, class T>
__device__ inline void softmax(Softmax& rows, float (&o)[D / 2], uint32_t (&p)[kTile / 16][4], const Scores& s,
                               float scale2) {
  float base[2], fade[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kTile / 2; ++j)
      if (of_row(j) == r) top = fmaxf(top, s[j]);
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = fmaxf(rows.top[r], top * scale2);
    base[r] = top == -INFINITY ? 0.f : top;  // a row that has seen nothing: all of P is exp2(-inf)
    fade[r] = ptx::ex2(rows.top[r] - base[r]);
    rows.top[r] = top;
    rows.sum[r] *= fade[r];
  }
#pragma unroll
  for (int j = 0; j < kTile / 2; j += 2) {
    const int r = of_row(j);
    const float x = ptx::ex2(fmaf(s[j], scale2, -base[r])), y = ptx::ex2(fmaf(s[j + 1], scale2, -base[r]));
    rows.sum[r] += x + y;
    p[j / 8][j / 2 % 4] = ptx::pack2<T>(x, y);
  }
  if (__any_sync(0xffffffffu, fade[0] != 1.f || fade[1] != 1.f)) {
#pragma unroll
    for (int j = 0; j < D / 2; ++j) o[j] *= fade[of_row(j)];
  }
}

template <int D, class T, int N>
__device__ inline void attend(const Ring<D>& ring, const Meeting<N>* notes, const Head<T>& out, float* lse,
                              const Pattern& pattern, int block, float scale2) {
  using L = Layout<D>;
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32, i = N * block + group;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // the thread's first row of the tile
  const auto release = [&](uint32_t step) {
    if (lane == 0) ptx::mbar_arrive(ring.empty(step));
  };

  // From `step` on, the first stage that this warpgroup meets → its tile and its mask's number.
  uint32_t step = 0;
  int index, id;
  const auto find = [&] {
    for (;; ++step) {
      ptx::mbar_wait(ring.full(step), ring.phase(step));
      const Meeting<N>& note = notes[step % L::kStages];
      index = __shfl_sync(0xffffffffu, note.index, 0), id = __shfl_sync(0xffffffffu, note.id[group], 0);
      if (index == kNoMore) return false;
      if (id != -2) return true;
      release(step);
    }
  };

  Scores s;
  uint32_t p[kTile / 16][4];
  float o[D / 2] = {};
  Softmax rows;
  ptx::mbar_wait(ring.q_full(), 0);
  if (find()) {
    ptx::hold_registers(o);
    start_scores<D, T>(s, ring, group, step);
    ptx::wgmma_commit();
    for (uint32_t before = kNone;;) {
      ptx::wgmma_wait<0>();
      ptx::hold_registers(s);
      ptx::hold_registers(o);
      if (before != kNone) release(before);
      if (!pattern.whole(i, index, id)) hide(s, [&](int r) { return pattern.row_bits(i, index, id, row + 8 * r); });
      softmax<D, T>(rows, o, p, s, scale2);
      start_mix<D, T>(o, p, ring, step);
      ptx::wgmma_commit();
      before = step++;
      if (!find()) break;
      start_scores<D, T>(s, ring, group, step);
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    ptx::hold_registers(o);
  }

  // Rows leave through the registers: pairs of four lanes are 16 bytes side by side.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t t = int64_t(i) * kTile + row + 8 * r;
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (t >= pattern.Tq) continue;
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    T* to = out.row(t) + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      *reinterpret_cast<uint32_t*>(to + 8 * d) =
          ptx::pack2<T>(o[4 * d + 2 * r] * inverse, o[4 * d + 2 * r + 1] * inverse);
    if (lane % 4 == 0) lse[t] = sum > 0.f ? (rows.top[r] + log2f(sum)) * kLn2 : kEmptyLse;
  }
}

template <int D, class T>
__global__ void __launch_bounds__(Layout<D>::kThreads, Layout<D>::kBlocks)
    attention_fwd_sm90_kernel(Heads<T> o,                             // [B, H, Tq, D]
                              float* lse,                             // [B, H, Tq]
                              const __grid_constant__ CUtensorMap q,  // [B, H, Tq, D]
                              const __grid_constant__ CUtensorMap k,  // [B, H, Tk, D]
                              const __grid_constant__ CUtensorMap v,  // [B, H, Tk, D]
                              Pattern pattern, float scale2) {
  using L = Layout<D>;
  DYN_SMEM_1024(unsigned char, shared);
  STATIC_SMEM(uint64_t, bars, 1 + 2 * L::kStages);
  STATIC_SMEM(Meeting<L::kGroups>, notes, L::kStages);
  const Ring<D> ring = {ptx::smem_u32(shared), ptx::smem_u32(bars)};

  // Indices. The longest rows of a head first.
  constexpr int kRows = L::kGroups * kTile;
  const int blocks = (pattern.Tq + kRows - 1) / kRows;
  const int bh = int(blockIdx.x / blocks), block = blocks - 1 - int(blockIdx.x % blocks);

  if (threadIdx.x == 0) {
    ptx::mbar_init(ring.q_full(), 1);
    for (int i = 0; i < L::kStages; ++i) {
      ptx::mbar_init(ring.full(i), 1);
      ptx::mbar_init(ring.empty(i), L::kMath / 32);  // every warp that reads it
    }
    ptx::mbar_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < L::kMath) {
    ptx::reg_alloc<L::kMathRegisters>();
    attend<D, T>(ring, notes, o[bh], lse + int64_t(bh) * pattern.Tq, pattern, block, scale2);
  } else {
    ptx::reg_dealloc<L::kOtherRegisters>();
    if (threadIdx.x == L::kMath)
      bring<D>(ring, notes, &q, &k, &v, pattern, block, bh % o.count, bh / o.count);
  }
}

template <int D>
CUtensorMap map_of(const View& x) {
  const auto stride = [&](int i) { return uint64_t(x.size[i] == 1 ? D : x.stride[i]); };
  const uint64_t size[4] = {D, uint64_t(x.size[2]), uint64_t(x.size[1]), uint64_t(x.size[0])};
  const uint64_t strides[3] = {stride(2), stride(1), stride(0)};
  const uint32_t box[4] = {Layout<D>::kPanel, kTile, 1, 1};
  return tensor_map<4>(x.data, x.dtype, size, strides, box,
                       D % 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace

void attention_fwd_sm90(View o, View lse, View q, View k, View v, BlockMaskView mask, bool causal, float scale,
                        Stream stream) {
  by_head(q, [&]<class T, int D>() {
    if constexpr (D >= 64) {
      using L = Layout<D>;
      const int64_t blocks = q.size[0] * q.size[1] * ((q.size[2] + L::kGroups * kTile - 1) / (L::kGroups * kTile));
      allow_shared(attention_fwd_sm90_kernel<D, T>, L::kShared);
      LAUNCH((attention_fwd_sm90_kernel<D, T>), unsigned(blocks), L::kThreads, L::kShared, stream, Heads<T>(o),
             lse.as<float>(), map_of<D>(q), map_of<D>(k), map_of<D>(v), Pattern(q.size[2], k.size[2], causal, mask),
             scale * kLog2e);
    }
  });
}

}  // namespace cuda
}  // namespace igpt
