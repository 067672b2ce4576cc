// linear_fwd:  y[n, m] = (residual[n, m] +) f(sum_k x'[n, k] weight[m, k] (+ bias[m]))   for a decoding step's few rows
//
// x [N, K]   weight [M, K]   bias [M]   norm [K]   residual, y [N, M], all bf16 or all f16, dense, K a multiple of
// eight. x' is x or, with a norm, x rstd norm as rms_norm has it;   f is quick GELU or nothing.
//
// By mma m16n8k16, 16 rows of x by 8 of the weight. A block owns 8 J outputs of 16 R rows, and each of its eight warps
// an eighth of K, 32 columns at a time. Both operands come by cp.async, a few steps ahead, each lane's sixteen bytes to
// where it alone finds them: its eight neighbours in k are what it holds in two products, so k is in another order than
// in memory, in the same one for both. The warps' sums are added up in their order. So an element is summed in an order
// that K alone decides: an image's bits do not depend on its batch.
//
// Bytes: the weight once from memory (S: 0.5 to 2.1 MB, 0.12 to 0.5 µs at 4.3 TB/s), 2 N K of x from L2 for each of the
// M / 8 J blocks: 8 MB for 64 rows of M = K / 4 = 512, 1.5 µs at 5.5 TB/s, which binds; 2 N M K flops are nothing. Few
// rows: one round trip to memory, since all that a warp reads of 1,024 columns is asked for at once. A norm's sums of
// squares are made while the weight is on its way, by every block for itself: a kernel for them would cost a launch.
//
// sass linear_fwd_kernel<bf16, 2, 2, false>: HMMA = 8, LOCAL = 0
// sass linear_fwd_kernel<bf16, 2, 2, true>: HMMA = 8, LOCAL = 0
#include "../common/check.h"
#include "activation.cuh"
#include "device.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 32;                // of K at a time: eight for each of four lanes
constexpr int kStride = kWarps * kColumns;  // from a warp's step to its next
template <int R>
constexpr int kStages = R == 1 ? 4 : 2;

template <int R, int J, bool kNorm>
constexpr int kParts = J + 2 * R + kNorm;  // a lane's rows: of the weight, of x, and the norm
template <int R, int J, bool kNorm>
constexpr int kBytes =
    kWarps * kStages<R> * kParts<R, J, kNorm> * 512;  // 48 KB, and 80 for 64 rows; 64 and 88 with a norm

// Eight neighbours in k of a row, normalised and rounded.
template <class T>
__device__ inline uint4 normalised(uint4 x, float rstd, uint4 norm) {
  Floats<8> y = floats_of<T, 8>(x);
  const Floats<8> gain = floats_of<T, 8>(norm);
#pragma unroll
  for (int k = 0; k < 8; ++k) y.v[k] = y.v[k] * rstd * gain.v[k];
  return bits_of<T, 8>(y);
}

// rstd of 16 R rows, of which each warp has an equal share, side by side: one after the other each would wait for L2.
template <class T, int R>
__device__ inline void find_rstd(float (&rstd)[16 * R], const T* x, int64_t first_row, int64_t N, int K, float eps) {
  constexpr int kMine = 16 * R / kWarps;
  const int warp = threadIdx.x / 32;
  float squares[kMine] = {};
  for (int k = threadIdx.x % 32 * 8; k < K; k += 256) {
    Bits<T, 8> bits[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int64_t row = first_row + warp + i * kWarps;
      bits[i] = row < N ? __ldca(reinterpret_cast<const Bits<T, 8>*>(x + row * K + k)) : Bits<T, 8>{};
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const Floats<8> v = floats_of<T, 8>(bits[i]);
#pragma unroll
      for (int e = 0; e < 8; ++e) squares[i] += v.v[e] * v.v[e];
    }
  }
#pragma unroll
  for (int offset = 16; offset; offset /= 2)
#pragma unroll
    for (int i = 0; i < kMine; ++i) squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], offset);
#pragma unroll
  for (int i = 0; i < kMine; ++i)
    if (threadIdx.x % 32 == 0) rstd[warp + i * kWarps] = rsqrtf(squares[i] / float(K) + eps);
}

template <class T, int R, int J, bool kNorm>
__global__ void __launch_bounds__(kThreads) linear_fwd_kernel(T* y,               // [N, M]
                                                              const T* x,         // [N, K]
                                                              const T* weight,    // [M, K]
                                                              const T* bias,      // [M] or null
                                                              const T* norm,      // [K] with kNorm
                                                              const T* residual,  // [N, M] or null
                                                              float eps, bool gelu, int64_t N, int M, int K) {
  DYN_SMEM(uint4, memory);
  STATIC_SMEM(float, rstd, 16 * R);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4;
  const int64_t first_row = int64_t(blockIdx.y) * 16 * R;
  const int first_out = blockIdx.x * 8 * J;

  // The rows that this lane reads: of the weight, and of x one of the upper and one of the lower eight of each 16.
  constexpr int kRows = kParts<R, J, kNorm>;
  const T* const weights = weight + int64_t(first_out + group) * K;
  const T* const inputs = x + (first_row + group) * K;
  const int outs = M - first_out - group;
  const int others = int(min(N - first_row - group, int64_t(16 * R)));

  // This warp's share of K: what there is of it comes into a ring.
  uint4* const ring = memory + warp * kStages<R> * kRows * 32 + lane;
  const auto ask = [&](int stage, int at) {
    const int k = at + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = 8 * (i < J ? i : i - J);
      const bool last = kNorm && i == kRows - 1, there = k < K && (last || (i < J ? row < outs : row < others));
      const T* from = last ? norm + k : (i < J ? weights : inputs) + (row * K + k);
      ptx::cp_async<16>(ptx::smem_u32(ring + (stage * kRows + i) * 32), there ? from : x, there ? 16 : 0);
    }
  };
#pragma unroll
  for (int s = 0; s < kStages<R>; ++s) {
    ask(s, warp * kColumns + s * kStride);
    ptx::cp_async_commit();
  }
  // What is added to this thread's outputs. Of few rows without a norm it is on its way from here on as well; else
  // there are no registers for it.
  constexpr int kTurns = (R * J * 128 + kThreads - 1) / kThreads;
  const auto place = [&](int turn, int64_t& row, int& out) {  // whether there is one
    const int at = turn * kThreads + threadIdx.x, of = at % 32, e = at / 32 % 4, tile = at / 128;  // whose sum it was
    row = first_row + 16 * (tile / J) + 8 * (e / 2) + of / 4, out = first_out + 8 * (tile % J) + of % 4 * 2 + e % 2;
    return at < R * J * 128 && row < N && out < M;
  };
  T biases[kTurns], residuals[kTurns];
  const auto ask_added = [&] {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      int64_t row;
      int out;
      const bool there = place(turn, row, out);
      if (there && bias) biases[turn] = bias[out];
      if (there && residual) residuals[turn] = residual[row * M + out];
    }
  };
  constexpr bool kEarly = kTurns == 1 && !kNorm;
  if constexpr (kEarly) ask_added();
  if constexpr (kNorm) {
    find_rstd<T, R>(rstd, x, first_row, N, K, eps);
    __syncthreads();
  }
  float sums[R][J][4] = {};
  for (int at = warp * kColumns, stage = 0; at < K; at += kStride, stage = (stage + 1) % kStages<R>) {
    ptx::cp_async_wait<kStages<R> - 1>();
    uint4 w[J];
#pragma unroll
    for (int j = 0; j < J; ++j) w[j] = ring[(stage * kRows + j) * 32];
    const uint4 gain = kNorm ? ring[(stage * kRows + J + 2 * R) * 32] : uint4{};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      uint4 t = ring[(stage * kRows + J + 2 * r) * 32], l = ring[(stage * kRows + J + 2 * r + 1) * 32];
      if constexpr (kNorm) {
        t = normalised<T>(t, rstd[16 * r + group], gain);
        l = normalised<T>(l, rstd[16 * r + 8 + group], gain);
      }
      const uint32_t a[2][4] = {{t.x, l.x, t.y, l.y}, {t.z, l.z, t.w, l.w}};
#pragma unroll
      for (int j = 0; j < J; ++j) {
        ptx::mma_m16n8k16<T>(sums[r][j], a[0], w[j].x, w[j].y);
        ptx::mma_m16n8k16<T>(sums[r][j], a[1], w[j].z, w[j].w);
      }
    }
    ask(stage, at + kStages<R> * kStride);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody needs the rings any more
  if constexpr (!kEarly) ask_added();

  // All shares.
  float* const parts = reinterpret_cast<float*>(memory);
  static_assert(kWarps * R * J * 128 * 4 <= kBytes<R, J, kNorm>);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) parts[((warp * R + r) * J + j) * 128 + e * 32 + lane] = sums[r][j][e];
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    int64_t row;
    int out;
    if (!place(turn, row, out)) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w * R * J * 128 + turn * kThreads + threadIdx.x];
    if (bias) sum += float(biases[turn]);
    if (gelu) sum = quick_gelu(sum);
    if (residual) sum += float(residuals[turn]);
    store_as<T, 1>(y, row * M + out, {sum});
  }
}

static void linear_fwd(View y, View x, View weight, View bias, View norm, View residual, float eps, bool gelu,
                       Stream stream) {
  IGPT_CHECK(x.dtype == DType::bf16 || x.dtype == DType::f16, "linear: bfloat16 or float16 only");
  IGPT_CHECK(weight.ndim == 2 && x.cols() == weight.size[1], "linear: weight must be [M, K] with K the columns of x");
  IGPT_CHECK(y.rows() == x.rows() && y.cols() == weight.size[0], "linear: y must be [N, M]");
  IGPT_CHECK(!bias || bias.numel() == weight.size[0], "linear: bias must be [M]");
  IGPT_CHECK(!norm || norm.numel() == x.cols(), "linear: norm must be [K]");
  IGPT_CHECK(!residual || same_shape(residual, y), "linear: residual must be shaped like y");
  for (const View* v : {&x, &y, &weight, &bias, &norm, &residual})
    IGPT_CHECK(!*v || (v->dtype == x.dtype && v->dense()), "linear: dense tensors of one dtype only");
  const int64_t N = x.rows(), K = x.cols(), M = weight.size[0];
  IGPT_CHECK(K % 8 == 0 && K <= 1 << 24 && M <= 1 << 30, "linear: K must be a multiple of eight, at most 2^24");
  for (const View* v : {&x, &weight, &norm})
    IGPT_CHECK(reinterpret_cast<uintptr_t>(v->data) % 16 == 0,
               "linear: x, weight and norm must begin at multiples of 16 bytes; copy them");
  IGPT_CHECK(N <= 1 << 20, "linear: too many rows for one launch; a library multiplies them faster");
  if (N == 0 || M == 0) return;
  const OnDevice device(x);
  const auto run = [&]<class T, int R, int J, bool kNorm>() {
    const dim3 blocks(unsigned((M + 8 * J - 1) / (8 * J)), unsigned((N + 16 * R - 1) / (16 * R)));
    constexpr int kShared = kBytes<R, J, kNorm>;
    allow_shared(linear_fwd_kernel<T, R, J, kNorm>, kShared);
    LAUNCH((linear_fwd_kernel<T, R, J, kNorm>), blocks, kThreads, kShared, stream, y.as<T>(), x.as<T>(), weight.as<T>(),
           bias.as<T>(), norm.as<T>(), residual.as<T>(), eps, gelu, N, int(M), int(K));
  };
  const auto by_norm = [&]<class T, int R, int J>() {
    norm ? run.template operator()<T, R, J, true>() : run.template operator()<T, R, J, false>();
  };
  const auto by_rows = [&]<class T>() {
    if (N <= 16) return by_norm.template operator()<T, 1, 1>();
    if (N <= 32) return by_norm.template operator()<T, 2, 2>();
    by_norm.template operator()<T, 4, 2>();
  };
  x.dtype == DType::bf16 ? by_rows.template operator()<__nv_bfloat16>() : by_rows.template operator()<__half>();
}

void fill_linear(Ops& t) {
  t.linear_fwd = linear_fwd;
}

}  // namespace cuda
}  // namespace igpt
