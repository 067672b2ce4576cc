// linear_cross_entropy:  logits = hidden weight^T    lse = log sum exp(logits)    loss = lse - logits[target]
// one value a row, natural logarithm; the logits stay in registers
//
// hidden [N, C], weight [V, C] of one dtype (f32, bf16, f16)   targets [N] i64   loss, lse, dloss [N] f32
// dlogits [N, V rounded up to 8], of hidden's dtype:  (softmax(logits) - onehot(target)) dloss, zeros behind V.
//
// A block of four warps computes tiles of 128 rows x 128 colours, each warp 64 x 64 of them, 128 sums a thread. Both
// operands come by cp.async in steps of 64 bytes of C, four steps in flight, and steps run on across the borders of
// tiles, so that the softmax of one tile hides the loads of the next. 16-bit products are mma m16n8k16 with float sums;
// float32 is multiplied and added as such (no tf32), by the same threads into the same places.
//   Forward: a block walks over all colours of its rows. A thread keeps the maximum and the sum of the columns that it
// owns, and only after the last tile do the four lanes and two warps of a row meet. Writes 8 bytes a row.
//   Backward: the gradient needs every logit again. A block computes one tile once more and writes its dlogits, for a
// chunk of rows that the caller chooses so small that the chunk stays in L2: no tensor [N, V] ever exists. The caller
// makes dhidden and dweight of it by two library products.
//
// Flops: 2 N V C forward, 2 N V C for dlogits, twice that in the two products: 8 N V C, where 6 are the floor with
// logits kept. For N = 32768, V = 512, C = 512: 17.2 G each, 68.7 G in all, bound by the tensor cores. Bytes beside
// those of L2: hidden twice (2 x 33.5 MB), its gradient once, and for the two products the chunk's hidden again.
// L2 to shared memory: 16 KB for 2 x 128 x 128 x 32 flops, 64 flops a byte. Shared memory to registers: 2 x 64 x 64 x
// 16 flops for 4 KB, with the copies' writes 75 % of the time of an A100's mma. One exp2 a logit: 1 / 8 of the time of
// its 512 multiplications on an A100, which the second block of a multiprocessor hides.
//
// Hopper multiplies by kernels of its own where operands are 16-bit: linear_cross_entropy_sm90.cu.
//
// Refuses: C that is no multiple of 8, rows that do not begin at multiples of 16 bytes, mixed dtypes. A target outside
// 0..V-1 gives NaN as its loss and throughout its row of dlogits: no host reads it.
//
// sass linear_cross_entropy_fwd_kernel<bf16>: HMMA = 64, LDS <= 20, BAR = 1, LOCAL = 0
// sass linear_cross_entropy_dlogits_kernel<bf16>: HMMA = 64, LDS <= 20, BAR = 1, LOCAL = 0
// sass linear_cross_entropy_fwd_kernel<f32>: FFMA = 512, LOCAL = 0
#include "../common/check.h"
#include "launch.h"
#include "linear_cross_entropy.cuh"

namespace igpt {
namespace cuda {

constexpr int kSide = 128;      // rows and colours of a tile: two blocks of 128 sums a thread fill the registers
constexpr int kThreads = 128;   // four warps, 2 x 2
constexpr int kWarpSide = 64;   // rows and colours of a warp
constexpr int kStepBytes = 64;  // of each row and step: two mma deep, and a swizzle of four chunks
constexpr int kStages = 4;      // three steps on their way while one is multiplied; two blocks take 128 KB
constexpr int kOperand = kSide * kStepBytes;
constexpr int kShared = kStages * 2 * kOperand;
static_assert(kSide * kSide * sizeof(float) <= kShared, "a tile of dlogits is turned in the stages' memory");

template <class T>
struct Operands {
  const T* hidden;  // [N, C], rows hidden_stride apart
  const T* weight;  // [V, C], rows weight_stride apart
  int64_t hidden_stride, weight_stride, N;
  int V, C;
};

// ---- who owns what ----

// A thread's sums: [16 rows][8 colours][corner], as mma leaves them.
using Sums = float[4][8][4];

struct Place {
  int row, col;  // of the thread's first sum within the tile
  __device__ Place() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    row = warp / 2 * kWarpSide + lane / 4;
    col = warp % 2 * kWarpSide + lane % 4 * 2;
  }
  __device__ int row_of(int i) const { return row + 8 * i; }              // i of 8
  __device__ int col_of(int j) const { return col + j / 2 * 8 + j % 2; }  // j of 16
};
__device__ inline float& at(Sums& sums, int i, int j) {
  return sums[i / 2][j / 2][i % 2 * 2 + j % 2];
}

// Notes the target of row n for the block, -1 for one out of range. Returns whether it is in range.
__device__ inline bool target_of(int* target, const int64_t* targets, int64_t n, int V) {
  const int64_t t = targets[n];
  const bool valid = t >= 0 && t < V;
  target[threadIdx.x] = valid ? int(t) : -1;
  return valid;
}

// Where the 16 bytes `chunk` of a row lie: eight rows of one chunk, as ldmatrix reads them, touch all banks once.
__device__ inline int place_in_stage(int row, int chunk) {
  return row * kStepBytes + (chunk ^ (row / 2 & 3)) * 16;
}

// ---- logits of a tile ----

// Asks for 64 bytes of C of 128 rows of hidden and of weight, zeros where there are none.
template <class T>
__device__ inline void load_step(unsigned char* stage, const Operands<T>& o, int64_t first_row, int first_col, int k) {
  const int chunk = threadIdx.x % 4, c = k + chunk * int(16 / sizeof(T));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = threadIdx.x / 4 + 32 * i;
    const bool row = c < o.C && first_row + r < o.N, col = c < o.C && first_col + r < o.V;
    const uint32_t to = ptx::smem_u32(stage + place_in_stage(r, chunk));
    ptx::cp_async<16>(to, row ? o.hidden + (first_row + r) * o.hidden_stride + c : o.hidden, row ? 16 : 0);
    ptx::cp_async<16>(to + kOperand, col ? o.weight + (first_col + r) * o.weight_stride + c : o.weight, col ? 16 : 0);
  }
}

// Rows that are a multiple of eight apart have one swizzle, so their distance is a constant.
template <class T>
__device__ inline void multiply(Sums& sums, const unsigned char* stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * kWarpSide + lane % 16, col = warp % 2 * kWarpSide + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int k = 0; k < kStepBytes / 32; ++k) {
    const uint32_t hidden = ptx::smem_u32(stage) + place_in_stage(row, 2 * k + lane / 16);
    const uint32_t weight = ptx::smem_u32(stage) + kOperand + place_in_stage(col, 2 * k + lane / 8 % 2);
    uint32_t a[4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) ptx::ldmatrix(a[m], hidden + 16 * m * kStepBytes);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      ptx::ldmatrix(b, weight + 16 * n * kStepBytes);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        ptx::mma_m16n8k16<T>(sums[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(sums[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <>
__device__ inline void multiply<float>(Sums& sums, const unsigned char* stage) {
  const Place place;
#pragma unroll 1
  for (int chunk = 0; chunk < kStepBytes / 16; ++chunk) {
    const unsigned char* hidden = stage + place_in_stage(place.row, chunk);
    const unsigned char* weight = stage + kOperand + place_in_stage(place.col, chunk);
#pragma unroll
    for (int k = 0; k < 16; k += 8) {  // two numbers of C: the registers would not hold the rows' four
      float2 a[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const float2*>(hidden + 8 * i * kStepBytes + k);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(weight + (j / 2 * 8 + j % 2) * kStepBytes + k);
#pragma unroll
        for (int i = 0; i < 8; ++i) at(sums, i, j) += a[i].x * b.x, at(sums, i, j) += a[i].y * b.y;
      }
    }
  }
}

// Calls finish(first colour, logits) for each tile of 128 colours from `begin` to `end`; logits beyond V are -inf.
template <class T, class F>
__device__ inline void each_tile(unsigned char* shared, const Operands<T>& o, int64_t first_row, int begin, int end,
                                 F finish) {
  constexpr int kDepth = kStepBytes / sizeof(T);
  int next_col = begin, next_k = 0, slot = 0;
  const auto load_next = [&](int to) {
    if (next_col < end) load_step(shared + to * 2 * kOperand, o, first_row, next_col, next_k);
    ptx::cp_async_commit();  // a group of nothing behind the end, so that the count stays
    next_k += kDepth;
    if (next_k >= o.C) next_k = 0, next_col += kSide;
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load_next(s);
  for (int col = begin; col < end; col += kSide) {
    Sums sums = {};
    for (int k = 0; k < o.C; k += kDepth) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // this step has come for all, and all have read the step before, whose memory is next
      load_next((slot + kStages - 1) % kStages);
      multiply<T>(sums, shared + slot * 2 * kOperand);
      slot = (slot + 1) % kStages;
    }
    if (col + kSide > o.V) {
      const Place place;
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (col + place.col_of(j) >= o.V) at(sums, i, j) = -INFINITY;
    }
    finish(col, sums);
  }
  ptx::cp_async_wait<0>();
}

// ---- forward ----

template <class T>
__global__ void __launch_bounds__(kThreads, 2) linear_cross_entropy_fwd_kernel(float* loss,             // [N]
                                                                               float* lse,              // [N]
                                                                               const int64_t* targets,  // [N]
                                                                               Operands<T> o) {
  DYN_SMEM(unsigned char, shared);
  STATIC_SMEM(int, target, kSide);      // -1 for one out of range
  STATIC_SMEM(float, chosen, kSide);    // the logit of the target
  STATIC_SMEM(float, half, 2 * kSide);  // maximum and sum of a row's right half
  const int64_t first_row = int64_t(blockIdx.x) * kSide;
  const Place place;

  // Targets; the first step's barrier publishes them.
  if (first_row + threadIdx.x < o.N) target_of(target, targets, first_row + threadIdx.x, o.V);

  // Tiles.
  Softmax rows[8];
  each_tile(shared, o, first_row, 0, o.V, [&](int col, Sums& logits) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at_target = target[place.row_of(i)] - col;
      float higher = rows[i].top;
#pragma unroll
      for (int j = 0; j < 16; ++j) higher = fmaxf(higher, at(logits, i, j));
      rows[i].raise(higher);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float x = at(logits, i, j);
        rows[i].add(x);
        if (place.col_of(j) == at_target) chosen[place.row_of(i)] = x;
      }
    }
  });

  // Rows: four lanes, then two warps.
  const bool left = threadIdx.x / 32 % 2 == 0, first_lane = threadIdx.x % 4 == 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    rows[i].join_four();
    if (!left && first_lane) half[2 * place.row_of(i)] = rows[i].top, half[2 * place.row_of(i) + 1] = rows[i].sum;
  }
  __syncthreads();
  if (!left || !first_lane) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int r = place.row_of(i);
    rows[i].join(half[2 * r], half[2 * r + 1]);
    if (first_row + r >= o.N) continue;
    const float l = rows[i].lse();
    lse[first_row + r] = l;
    loss[first_row + r] = target[r] >= 0 ? l - chosen[r] : NAN;
  }
}

// ---- dlogits ----

// Where a thread turns its columns so that rows leave in 16 bytes: rows of one column lie in different banks.
template <class T>
__device__ inline int place_in_tile(int row, int chunk) {
  return row * kSide * int(sizeof(T)) + (chunk ^ row % 8 * int(sizeof(T) / 2)) * 16;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) linear_cross_entropy_dlogits_kernel(T* dlogits,          // [N, width]
                                                                                   const float* dloss,  // [N]
                                                                                   const int64_t* targets,  // [N]
                                                                                   const float* lse,        // [N]
                                                                                   Operands<T> o, int width) {
  DYN_SMEM(unsigned char, shared);
  STATIC_SMEM(int, target, kSide);   // -1 for one out of range
  STATIC_SMEM(float, scale, kSide);  // dloss, NaN for such a row
  STATIC_SMEM(float, row_lse, kSide);
  const int tiles = (o.V + kSide - 1) / kSide;
  const int64_t first_row = int64_t(blockIdx.x / tiles) * kSide;  // blocks of one row of tiles share hidden in L2
  const int first_col = int(blockIdx.x % tiles) * kSide;
  const Place place;

  // Rows; the first step's barrier publishes them.
  if (first_row + threadIdx.x < o.N) {
    const int64_t n = first_row + threadIdx.x;
    const bool valid = target_of(target, targets, n, o.V);
    scale[threadIdx.x] = valid ? dloss[n] : NAN, row_lse[threadIdx.x] = lse[n];
  }

  // The tile, turned in shared memory.
  each_tile(shared, o, first_row, first_col, first_col + 1, [&](int, Sums& logits) {
    __syncthreads();  // the last step has been read
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = place.row_of(i);
      const int at_target = target[r] - first_col;
      const float g = scale[r], l = row_lse[r];
#pragma unroll
      for (int j = 0; j < 16; j += 2) {
        const float d0 = dlogit(at(logits, i, j), l, g, place.col_of(j) == at_target);
        const float d1 = dlogit(at(logits, i, j + 1), l, g, place.col_of(j + 1) == at_target);
        const int bytes = place.col_of(j) * int(sizeof(T));
        unsigned char* to = shared + place_in_tile<T>(r, bytes / 16) + bytes % 16;
        if constexpr (sizeof(T) == 4)
          *reinterpret_cast<float2*>(to) = make_float2(d0, d1);
        else
          *reinterpret_cast<uint32_t*>(to) = ptx::pack2<T>(d0, d1);
      }
    }
  });
  __syncthreads();

  // Rows leave in 16 bytes.
  constexpr int kEach = 16 / sizeof(T), kChunks = kSide / kEach;
#pragma unroll 4
  for (int i = threadIdx.x; i < kSide * kChunks; i += kThreads) {
    const int r = i / kChunks, chunk = i % kChunks, col = first_col + chunk * kEach;
    if (first_row + r < o.N && col < width)
      *reinterpret_cast<uint4*>(dlogits + (first_row + r) * width + col) =
          *reinterpret_cast<const uint4*>(shared + place_in_tile<T>(r, chunk));
  }
}

// ---- launchers ----

static bool sixteens(const View& rows) {
  const int64_t each = rows.dtype == DType::f32 ? 4 : 8;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && (rows.size[0] <= 1 || rows.stride[0] % each == 0);
}

static void check_head(const View& hidden, const View& weight, const View& targets, const View& lse, const View& loss) {
  IGPT_CHECK(is_gpu_float(hidden.dtype) && weight.dtype == hidden.dtype,
             "linear_cross_entropy: hidden and weight must both be float32, bfloat16 or float16");
  IGPT_CHECK(hidden.ndim == 2 && weight.ndim == 2 && weight.cols() == hidden.cols() && weight.size[0] >= 1,
             "linear_cross_entropy: hidden must be [N, C] and weight [V, C] with V from 1");
  IGPT_CHECK(hidden.cols() % 8 == 0 && hidden.cols() >= 8 && hidden.cols() <= INT32_MAX / 2,
             "linear_cross_entropy: the columns of hidden must be a multiple of 8; pad hidden and weight with zeros");
  IGPT_CHECK(sixteens(hidden) && sixteens(weight),
             "linear_cross_entropy: rows of hidden and weight must begin at multiples of 16 bytes; copy them");
  IGPT_CHECK(weight.size[0] <= INT32_MAX / 2, "linear_cross_entropy: weight has too many rows");
  IGPT_CHECK(targets.dtype == DType::i64 && lse.dtype == DType::f32 && loss.dtype == DType::f32,
             "linear_cross_entropy: targets must be int64, lse, loss and its gradient float32");
  for (const View* v : {&targets, &lse, &loss})
    IGPT_CHECK(v->ndim == 1 && v->size[0] == hidden.size[0] && v->dense(),
               "linear_cross_entropy: targets, lse, loss and its gradient must be dense, one value a row of hidden");
}

// Hopper's kernels read by tensor maps, which know no rows that are all one.
static bool on_hopper(const View& hidden, const View& weight) {
  const auto apart = [](const View& v) { return v.size[0] == 1 || v.stride[0] >= v.cols(); };
  return hidden.dtype != DType::f32 && apart(hidden) && apart(weight) && compute_capability() == 9;
}

template <class T>
static Operands<T> operands(const View& hidden, const View& weight) {
  return {hidden.as<T>(), weight.as<T>(),      hidden.stride[0],  weight.stride[0],
          hidden.size[0], int(weight.size[0]), int(hidden.cols())};
}

static unsigned blocks_of(int64_t rows, int64_t tiles) {
  const int64_t blocks = (rows + kSide - 1) / kSide * tiles;
  IGPT_CHECK(blocks <= INT32_MAX, "linear_cross_entropy: too many rows for one launch");
  return unsigned(blocks);
}

static void linear_cross_entropy_fwd(View loss, View lse, View hidden, View weight, View targets, Stream stream) {
  check_head(hidden, weight, targets, lse, loss);
  if (hidden.size[0] == 0) return;
  const OnDevice device(hidden);
  if (on_hopper(hidden, weight)) return linear_cross_entropy_fwd_sm90(loss, lse, hidden, weight, targets, stream);
  by_type(hidden.dtype, true, [&]<class T, int>() {
    allow_shared(linear_cross_entropy_fwd_kernel<T>, kShared);
    LAUNCH(linear_cross_entropy_fwd_kernel<T>, blocks_of(hidden.size[0], 1), kThreads, kShared, stream,
           loss.as<float>(), lse.as<float>(), targets.as<int64_t>(), operands<T>(hidden, weight));
  });
}

static void linear_cross_entropy_dlogits(View dlogits, View dloss, View hidden, View weight, View targets, View lse,
                                         Stream stream) {
  check_head(hidden, weight, targets, lse, dloss);
  const int64_t width = (weight.size[0] + 7) / 8 * 8;
  IGPT_CHECK(dlogits.ndim == 2 && dlogits.size[0] == hidden.size[0] && dlogits.cols() == width && dlogits.dense() &&
                 dlogits.dtype == hidden.dtype && sixteens(dlogits),
             "linear_cross_entropy_dlogits: dlogits must be dense [N, V rounded up to 8], of hidden's dtype, aligned");
  if (hidden.size[0] == 0) return;
  const OnDevice device(hidden);
  if (on_hopper(hidden, weight))
    return linear_cross_entropy_dlogits_sm90(dlogits, dloss, hidden, weight, targets, lse, stream);
  by_type(hidden.dtype, true, [&]<class T, int>() {
    allow_shared(linear_cross_entropy_dlogits_kernel<T>, kShared);
    LAUNCH(linear_cross_entropy_dlogits_kernel<T>, blocks_of(hidden.size[0], (weight.size[0] + kSide - 1) / kSide),
           kThreads, kShared, stream, dlogits.as<T>(), dloss.as<float>(), targets.as<int64_t>(), lse.as<float>(),
           operands<T>(hidden, weight), int(width));
  });
}

void fill_linear_cross_entropy(Ops& t) {
  t.linear_cross_entropy_fwd = linear_cross_entropy_fwd;
  t.linear_cross_entropy_dlogits = linear_cross_entropy_dlogits;
}

}  // namespace cuda
}  // namespace igpt
