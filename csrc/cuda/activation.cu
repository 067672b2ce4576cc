// bias_quick_gelu:  z = x (+ bias)    y = z sigmoid(1.702 z)
//
// x, y [N, C] of one dtype (f32, bf16, f16)   bias [C] of any of the three, may be absent   dbias f32 [P, C].
// A thread owns neighbouring columns, 16 bytes of them where addresses allow, with their bias in registers. Forward: it
// loads its four rows, then computes; blocks are many and short, so that others load meanwhile. Backward:
// sg = sigmoid(1.702 z)    dx = dy sg (1 + 1.702 z (1 - sg))    row p of dbias = sum of dx over group p of rows
// A block owns a group of rows and 128 vectors of columns; its three teams walk down the rows, two at a time, with the
// next two on their way. A thread sums dbias of its columns in registers, the three sums meet in shared memory at the
// end, and a kernel after it adds all rows of dbias into row 0: one order throughout.
// Bound by bytes: x + y an element forward, x + dy + dx backward (bf16: 4 and 6). One exp2 and one reciprocal an
// element: at 16 a clock and multiprocessor they take half the time of the bytes of bf16.
// Refuses: other dtypes, tensors with gaps. Any dx may be the memory of dy or x.
// sass bias_quick_gelu_fwd_kernel<bf16, 8>: LDG.128 = 4, STG.128 = 4, STG = 0, MUFU = 64, LDS = 0, BAR = 0, LOCAL = 0
// sass bias_quick_gelu_bwd_kernel<bf16, 8>: LDG.128 = 4, STG.128 = 2, STG = 0, MUFU = 32, BAR = 0, LOCAL = 0
#include <algorithm>

#include "../common/check.h"
#include "../common/math.h"
#include "activation.cuh"
#include "device.cuh"
#include "groups.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kRows = 4;          // loaded before the first is computed
constexpr int kTeams = 3;         // of kThreads, backward: two blocks of three leave each thread 80 registers
constexpr int kAhead = 2;         // rows of a team at once, and as many on their way
constexpr int kGroup = 32;        // rows a block backward, where the caller leaves their number to us
constexpr int64_t kMost = 65535;  // of a grid's second dimension

struct Bias {
  const void* data;
  DType dtype;
};

// ---- one element ----

template <int V>
__device__ inline Floats<V> bias_of(const Bias& bias, int64_t c) {
  return bias.data ? load<V>(bias.data, bias.dtype, c) : Floats<V>{};
}

// ---- kernels ----

template <class T, int V>
__global__ void __launch_bounds__(kThreads) bias_quick_gelu_fwd_kernel(T* y,        // [N, C]
                                                                       const T* x,  // [N, C]
                                                                       Bias bias,   // [C] or null
                                                                       int64_t N, int64_t C) {
  const int64_t c = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (c >= C) return;
  const Floats<V> b = bias_of<V>(bias, c);
  for (int64_t n = int64_t(blockIdx.y) * kRows; n < N; n += int64_t(gridDim.y) * kRows) {
    Bits<T, V> in[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) in[r] = load_once<T, V>(x, (n + r) * C + c, n + r < N);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Floats<V> z = floats_of<T, V>(in[r]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        z.v[k] += b.v[k];
        z.v[k] *= sigmoid(z.v[k]);
      }
      if (n + r < N) store_as<T, V>(y, (n + r) * C + c, z);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads* kTeams, 2)
    bias_quick_gelu_bwd_kernel(T* dx,         // [N, C]
                               float* dbias,  // [P, C] or null, P = gridDim.y
                               const T* dy,   // [N, C]
                               const T* x,    // [N, C]
                               Bias bias,     // [C] or null
                               int64_t N, int64_t C) {
  constexpr int kStep = kTeams * kAhead;
  STATIC_SMEM(float, sums, (kTeams - 1) * kThreads * V);
  const int64_t c = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  const int64_t begin = blockIdx.y * N / gridDim.y, end = c < C ? (blockIdx.y + 1) * N / gridDim.y : 0;
  const Floats<V> b = c < C ? bias_of<V>(bias, c) : Floats<V>{};
  Floats<V> sum = {};

  Bits<T, V> z[kAhead], d[kAhead];
  auto fetch = [&](int64_t n) {
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      z[r] = load_once<T, V>(x, (n + r) * C + c, n + r < end);
      d[r] = load_once<T, V>(dy, (n + r) * C + c, n + r < end);
    }
  };
  int64_t n = begin + threadIdx.y * kAhead;
  fetch(n);
  for (; n < end; n += kStep) {
    Bits<T, V> z_now[kAhead], d_now[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) z_now[r] = z[r], d_now[r] = d[r];
    fetch(n + kStep);
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const Floats<V> t = floats_of<T, V>(z_now[r]);
      Floats<V> out = floats_of<T, V>(d_now[r]);  // zeros below the last row
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float u = t.v[k] + b.v[k], s = sigmoid(u);
        out.v[k] *= s * (1.f + kQuickGelu * u * (1.f - s));
        sum.v[k] += out.v[k];
      }
      if (n + r < end) store_as<T, V>(dx, (n + r) * C + c, out);
    }
  }

  if (!dbias) return;
  float* mine = sums + ((int(threadIdx.y) - 1) * kThreads + int(threadIdx.x)) * V;  // the first team has none
  if (threadIdx.y)
#pragma unroll
    for (int k = 0; k < V; ++k) mine[k] = sum.v[k];
  __syncthreads();
  if (threadIdx.y || c >= C) return;
#pragma unroll
  for (int team = 1; team < kTeams; ++team)
#pragma unroll
    for (int k = 0; k < V; ++k) sum.v[k] += mine[team * kThreads * V + k];
#pragma unroll
  for (int k = 0; k < V; ++k) dbias[blockIdx.y * C + c + k] = sum.v[k];
}

// ---- launchers ----

static void check_gelu(const View& y, const View& x, const View& bias) {
  IGPT_CHECK(is_gpu_float(x.dtype) && (!bias || is_gpu_float(bias.dtype)),
             "bias_quick_gelu: float32, bfloat16 or float16 only");
  IGPT_CHECK(same_shape(x, y) && x.dtype == y.dtype, "bias_quick_gelu: x and y must agree in shape and dtype");
  IGPT_CHECK(x.dense() && y.dense() && (!bias || bias.dense()), "bias_quick_gelu: dense tensors only");
  IGPT_CHECK(!bias || bias.numel() == x.cols(), "bias_quick_gelu: bias must have one element a column");
}

static unsigned column_blocks(int64_t C, int V) {
  return unsigned((C + kThreads * V - 1) / (kThreads * V));
}

static void bias_quick_gelu_fwd(View y, View x, View bias, Stream stream) {
  check_gelu(y, x, bias);
  const int64_t C = x.cols(), N = x.rows(), groups = std::min((N + kRows - 1) / kRows, kMost);
  if (N == 0) return;
  const OnDevice device(x);
  by_type(x.dtype, in_sixteens(x.dtype, C, {y, x, bias}), [&]<class T, int V>() {
    LAUNCH((bias_quick_gelu_fwd_kernel<T, V>), dim3(column_blocks(C, V), unsigned(groups)), kThreads, 0, stream,
           y.as<T>(), x.as<T>(), Bias{bias.data, bias.dtype}, N, C);
  });
}

static void bias_quick_gelu_bwd(View dx, View dbias, View dy, View x, View bias, Stream stream) {
  check_gelu(dx, x, bias), check_gelu(dy, x, bias);
  const int64_t C = x.cols(), N = x.rows();
  IGPT_CHECK(!dbias || (dbias.dtype == DType::f32 && dbias.ndim == 2 && dbias.cols() == C && dbias.dense() &&
                        dbias.size[0] >= 1 && dbias.size[0] <= kMost),
             "bias_quick_gelu_bwd: dbias must be float32 [P, C] with P from 1 to 65535");
  const int64_t groups = dbias ? dbias.size[0] : std::min((N + kGroup - 1) / kGroup, kMost);
  if (C == 0 || groups == 0) return;
  const OnDevice device(x);
  by_type(x.dtype, in_sixteens(x.dtype, C, {dx, dy, x, bias}), [&]<class T, int V>() {
    LAUNCH((bias_quick_gelu_bwd_kernel<T, V>), dim3(column_blocks(C, V), unsigned(groups)), dim3(kThreads, kTeams), 0,
           stream, dx.as<T>(), dbias.as<float>(), dy.as<T>(), x.as<T>(), Bias{bias.data, bias.dtype}, N, C);
  });
  if (dbias) sum_groups(dbias, stream);
}

void fill_activation(Ops& t) {
  t.bias_quick_gelu_fwd = bias_quick_gelu_fwd;
  t.bias_quick_gelu_bwd = bias_quick_gelu_bwd;
}

}  // namespace cuda
}  // namespace igpt
