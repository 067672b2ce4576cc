// What the attention kernels of Ampere and newer share: heads of a view, tiles in shared memory, which tiles a block
// meets, and who of a warp owns which score.
#pragma once
#include "../common/check.h"
#include "../common/math.h"
#include "device.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {
namespace attention {

constexpr int kThreads = 128;  // four warps of 32 rows
constexpr int kRows = 128;     // of the block's own tile: two tiles of a mask, two warps each
constexpr int kWarpRows = 32;  // so that a fragment of the other operand serves two products
static_assert(kRows == 2 * kTile && kRows == kThreads / 32 * kWarpRows);

// One head of a [B, H, T, D] view.
template <class T>
struct Head {
  T* data;
  int64_t stride;  // between rows
  __device__ T* row(int64_t t) const { return data + t * stride; }
};
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, row;  // strides
  int count;                 // heads of an image
  explicit Heads(const View& v)
      : data(v.as<T>()), batch(v.stride[0]), head(v.stride[1]), row(v.stride[2]), count(int(v.size[1])) {}
  __device__ Head<T> operator[](int bh) const {
    return {data + int64_t(bh / count) * batch + int64_t(bh % count) * head, row};
  }
};

// The same by the places of a mask's order, where it has one.
template <class T>
struct PlacedHead : Head<T> {
  const int* order;
  __device__ int64_t slot(int64_t t) const { return order ? order[t] : t; }
  __device__ T* row(int64_t t) const { return Head<T>::row(slot(t)); }
};
template <class T>
struct PlacedHeads : Heads<T> {
  const int* order;
  PlacedHeads(const View& v, const BlockMaskView& mask) : Heads<T>(v), order(mask.order.as<int>()) {}
  __device__ PlacedHead<T> operator[](int bh) const { return {Heads<T>::operator[](bh), order}; }
};

// ---- tiles in shared memory: rows of D elements of 16 bits in chunks of eight ----

// Chunks trade places within their group of eight (four where the row's length asks for it), so that the eight rows
// that ldmatrix reads of one chunk touch all banks once.
template <int D>
__device__ inline uint32_t chunk_of(int row, int chunk) {
  return uint32_t(row * D * 2 + (D % 64 ? chunk ^ (row / 2 & 3) : chunk ^ (row & 7)) * 16);
}

// Asks for rows t.. of a head; zeros behind the end.
template <int D, int rows, class T>
__device__ inline void load_tile(uint32_t tile, const PlacedHead<const T>& x, int64_t t, int64_t end) {
  constexpr int kChunks = D / 8;
  static_assert(rows * kChunks % kThreads == 0);
#pragma unroll 2
  for (int i = 0; i < rows * kChunks / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x, r = at / kChunks, chunk = at % kChunks;
    const bool there = t + r < end;
    ptx::cp_async<16>(tile + chunk_of<D>(r, chunk), there ? x.row(t + r) + chunk * 8 : x.data, there ? 16 : 0);
  }
}

// Where lane l finds its row of the 16 x 16 block at (row, 16 k), for ldmatrix: row + l % 16, chunk 2 k + l / 16.
// Blocks begin at multiples of 16 rows and tiles at multiples of 128 bytes, so k trades places by one exclusive or.
template <int D>
__device__ inline uint32_t block_of(uint32_t tile, int row, int k) {
  constexpr int kGroup = D % 64 ? 2 : 4;  // pairs of chunks that trade places
  const int lane = threadIdx.x % 32;
  const uint32_t first = tile + row * D * 2 + chunk_of<D>(lane % 16, lane / 16);
  return (first ^ k % kGroup * 32) + k / kGroup * kGroup * 32;
}

// ---- products of a warp: 16 M rows and 8 N columns of scores, where mma leaves them ----

// s += a b^T along D: rows from a_row on of tile a, rows from b_row on of tile b.
template <int D, class T, int M, int N>
__device__ inline void add_scores(float (&s)[M][N][4], uint32_t a, uint32_t b, int a_row, int b_row) {
#pragma unroll 2  // more load more fragments ahead than there are registers
  for (int d = 0; d < D / 16; ++d) {
    uint32_t x[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) ptx::ldmatrix(x[m], block_of<D>(a, a_row + 16 * m, d));
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      uint32_t y[4];  // rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
      ptx::ldmatrix(y, block_of<D>(b, b_row + 16 * n, d));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(s[m][2 * n], x[m], y[0], y[2]);
        ptx::mma_m16n8k16<T>(s[m][2 * n + 1], x[m], y[1], y[3]);
      }
    }
  }
}

// o += p b: b is the rows from b_row on of a tile, one for each column of p.
template <int D, class T, int M, int N>
__device__ inline void add_mix(float (&o)[M][D / 8][4], const float (&p)[M][N][4], uint32_t b, int b_row) {
#pragma unroll
  for (int n = 0; n < N / 2; ++n) {
    uint32_t x[M][4];  // what mma left in d is what it wants as a, two by two
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        x[m][j] = ptx::pack2<T>(p[m][2 * n + j / 2][j % 2 * 2], p[m][2 * n + j / 2][j % 2 * 2 + 1]);
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t y[4];  // tokens 0-7 and 8-15 of columns 0-7, then of columns 8-15
      ptx::ldmatrix_trans(y, block_of<D>(b, b_row + 16 * n, d));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(o[m][2 * d], x[m], y[0], y[1]);
        ptx::mma_m16n8k16<T>(o[m][2 * d + 1], x[m], y[2], y[3]);
      }
    }
  }
}

// A row of sums leaves through the registers, groups of four lanes with 16 bytes side by side: `factor` times what a
// thread has at `side` and the next, on top of `kept` times what is there, which is not read where nothing is kept.
template <int D, class T>
__device__ inline void leave_row(T* row, const float (&sums)[D / 8][4], int side, float factor, float kept) {
  uint32_t* to = reinterpret_cast<uint32_t*>(row) + threadIdx.x % 4;
#pragma unroll
  for (int d = 0; d < D / 8; ++d) {
    Floats<2> x = {sums[d][side] * factor, sums[d][side + 1] * factor};
    if (kept > 0.f) {
      const Floats<2> there = floats_of<T, 2>(to[4 * d]);
      x.v[0] = fmaf(kept, there.v[0], x.v[0]), x.v[1] = fmaf(kept, there.v[1], x.v[1]);
    }
    to[4 * d] = bits_of<T, 2>(x);
  }
}

// -inf where bits(r) does not have a column's bit; r counts from the thread's first row, the bits from column -first.
template <int M, int N, class Bits>
__device__ inline void hide(float (&s)[M][N][4], int first, Bits bits) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t seen = bits(16 * m + 8 * half) >> (first + threadIdx.x % 4 * 2);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (!(seen >> (8 * n + c) & 1)) s[m][n][2 * half + c] = -INFINITY;
    }
}

// ---- which tiles a block meets ----

// The tiles of one row (or column) of a mask by increasing index: entries of its lists. Without a mask the tiles
// themselves.
struct Line {
  int at, end;
};

// Lines side by side: a tile that any of them has. id[h] is kNotMet where line h does not have it, kWhole where no mask
// hides any of it, as the lists have it too, else the mask's number.
constexpr int kWhole = -1, kNotMet = -2;
template <int N>
struct Meeting {
  int index, id[N];
};
// tile, mask: the lists, null without a mask.
template <int N>
__device__ inline bool next(Meeting<N>& m, Line (&lines)[N], const int* tile, const int* mask) {
  int first[N];
  m.index = INT32_MAX;
#pragma unroll
  for (int h = 0; h < N; ++h) {
    first[h] = lines[h].at >= lines[h].end ? INT32_MAX : tile ? tile[lines[h].at] : lines[h].at;
    m.index = min(m.index, first[h]);
  }
  if (m.index == INT32_MAX) return false;
#pragma unroll
  for (int h = 0; h < N; ++h) {
    const bool has = first[h] == m.index;
    m.id[h] = !has ? kNotMet : mask ? mask[lines[h].at] : kWhole;
    lines[h].at += has;
  }
  return true;
}

// Keys, queries and the pattern of a call, as the kernels read it.
struct Pattern {
  const int *row_start, *row_tile, *row_mask, *col_start, *col_tile, *col_mask;  // null without a mask
  const uint64_t *bits, *bits_t;
  int Tq, Tk, nq, nk;
  bool causal;

  Pattern(int64_t queries, int64_t keys, bool is_causal, const BlockMaskView& m)
      : row_start(m.row_start.as<int>()), row_tile(m.row_tile.as<int>()), row_mask(m.row_mask.as<int>()),
        col_start(m.col_start.as<int>()), col_tile(m.col_tile.as<int>()), col_mask(m.col_mask.as<int>()),
        bits(m.bits.as<uint64_t>()), bits_t(m.bits_t.as<uint64_t>()), Tq(int(queries)), Tk(int(keys)),
        nq(int((queries + kTile - 1) / kTile)), nk(int((keys + kTile - 1) / kTile)), causal(is_causal && !m) {}

  // The key tiles of query tile i.
  __device__ Line row(int i) const {
    if (i >= nq) return {0, 0};
    if (row_start) return {row_start[i], row_start[i + 1]};
    return {0, causal ? i + 1 : nk};
  }
  // The query tiles of key tile j.
  __device__ Line col(int j) const {
    if (j >= nk) return {0, 0};
    if (col_start) return {col_start[j], col_start[j + 1]};
    return {causal ? j : 0, nq};
  }
  // True when every query of tile i sees every key of tile j, or would but for a mask.
  __device__ bool whole(int i, int j) const { return !(causal && i == j) && (j + 1) * kTile <= Tk; }
  // Which keys of tile j query r of tile i sees.
  __device__ uint64_t row_bits(int i, int j, int id, int r) const {
    uint64_t seen = id < 0 ? ~0ull : bits[int64_t(id) * kTile + r];
    if (causal && i == j) seen &= (2ull << r) - 1;
    const int keys = Tk - j * kTile;
    return keys < kTile ? seen & ((1ull << keys) - 1) : seen;
  }
  // Which queries of tile i see key r of tile j. Queries behind the end are not masked: their gradients are zero.
  __device__ uint64_t col_bits(int i, int j, int id, int r) const {
    if (j * kTile + r >= Tk) return 0;
    const uint64_t seen = id < 0 ? ~0ull : bits_t[int64_t(id) * kTile + r];
    return causal && i == j ? seen & (~0ull << r) : seen;
  }
};

// What the backward pass keeps of a query.
struct alignas(8) Stats {
  float lse2, delta;  // lse2 = log2(e) lse
};

// ---- host ----

// Calls f.template operator()<D>(), and f.template operator()<T, D>().
template <class F>
void by_dim(const View& q, F f) {
  switch (q.size[3]) {
    case 32:
      return f.template operator()<32>();
    case 64:
      return f.template operator()<64>();
    case 96:
      return f.template operator()<96>();
    default:
      return f.template operator()<128>();
  }
}
template <class F>
void by_head(const View& q, F f) {
  by_dim(q, [&]<int D>() {
    q.dtype == DType::bf16 ? f.template operator()<__nv_bfloat16, D>() : f.template operator()<__half, D>();
  });
}

inline void check_heads(const View& v, const View& q, const char* name) {
  IGPT_CHECK(v.ndim == 4 && v.size[0] == q.size[0] && v.size[1] == q.size[1] && v.size[3] == q.size[3] &&
                 v.dtype == q.dtype && v.device == q.device,
             "attention: %s must be [B, H, T, D] with q's batch, heads, head dim, dtype and device", name);
  const bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.stride[0] % 8 == 0 && v.stride[1] % 8 == 0 &&
                       v.stride[2] % 8 == 0;
  IGPT_CHECK(v.numel() == 0 || aligned, "attention: rows of %s must begin at multiples of 16 bytes; copy it", name);
}

inline void check_mask(const BlockMaskView& mask, const View& q, const View& k) {
  const int64_t nq = (q.size[2] + kTile - 1) / kTile, nk = (k.size[2] + kTile - 1) / kTile;
  IGPT_CHECK(mask.row_start.numel() == nq + 1 && mask.col_start.numel() == nk + 1,
             "attention: the mask's tile lists do not fit the sequence");
  for (const View* list :
       {&mask.row_start, &mask.row_tile, &mask.row_mask, &mask.col_start, &mask.col_tile, &mask.col_mask})
    IGPT_CHECK(list->dtype == DType::i32 && list->dense() && list->device == q.device,
               "attention: mask lists must be dense int32 on q's device");
  for (const View* words : {&mask.bits, &mask.bits_t})
    IGPT_CHECK(words->dtype == DType::i64 && words->dense() && words->device == q.device,
               "attention: mask bits must be dense int64 words on q's device");
  IGPT_CHECK(!mask.order || (mask.order.dtype == DType::i32 && mask.order.dense() && mask.order.device == q.device &&
                             mask.order.numel() == q.size[2]),
             "attention: a mask's order must be dense int32 on q's device, a slot for each token");
}

inline void check_attention(const View& q, const View& k, const View& v, bool causal, float scale,
                            const MaskParts& mask) {
  IGPT_CHECK(q.dtype == DType::bf16 || q.dtype == DType::f16, "attention: bfloat16 or float16 only");
  IGPT_CHECK(q.ndim == 4 && q.size[3] % 32 == 0 && q.size[3] >= 32 && q.size[3] <= 128,
             "attention: head dim must be 32, 64, 96 or 128");
  check_heads(q, q, "q");
  check_heads(k, q, "k");
  check_heads(v, q, "v");
  IGPT_CHECK(k.size[2] == v.size[2], "attention: k and v differ in length");
  IGPT_CHECK(!(causal || mask.count) || q.size[2] == k.size[2],
             "attention: causal or masked attention needs as many keys as queries");
  IGPT_CHECK(q.size[2] <= INT32_MAX / 2 && k.size[2] <= INT32_MAX / 2, "attention: sequences are too long");
  IGPT_CHECK(scale > 0.f, "attention: scale must be positive");
  for (int64_t p = 0; p < mask.count; ++p) check_mask(mask.part[p], q, k);
}

// body(part, whether it adds to what those before it gave), in order; once with the absent mask where there is none.
template <class F>
void each_part(const MaskParts& mask, F body) {
  if (mask.count == 0) body(BlockMaskView(), false);
  for (int64_t p = 0; p < mask.count; ++p) body(mask.part[p], p > 0);
}

// Whether Hopper's kernels serve a call: head dims 64, 96, 128, views that a tensor map can describe, raster order,
// nothing there to add to.
inline bool on_hopper(std::initializer_list<View> views, const BlockMaskView& mask, bool add) {
  bool mapped = !mask.order && !add;
  for (const View& x : views) {
    mapped = mapped && x.size[3] >= 64 && x.numel() > 0;
    for (int i = 0; i < 3; ++i) mapped = mapped && (x.size[i] == 1 || x.stride[i] > 0);
  }
  return mapped && compute_capability() == 9;
}

}  // namespace attention

void attention_bwd_sm90(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse,
                        BlockMaskView mask, bool causal, float scale, Stream stream);
void attention_fwd_sm90(View o, View lse, View q, View k, View v, BlockMaskView mask, bool causal, float scale,
                        Stream stream);

}  // namespace cuda
}  // namespace igpt
