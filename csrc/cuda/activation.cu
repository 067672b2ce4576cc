// bias_quick_gelu:  z = x (+ bias)    y = z sigmoid(1.702 z)
//
// x, y [N, C] of one dtype (f32, bf16, f16)   bias [C] of any of the three, may be absent   dbias f32 [P, C].
// A thread owns neighbouring columns, 16 bytes of them where addresses allow, and walks down its rows with the bias in
// registers, four rows in flight; no thread waits for another. Backward:  sg = sigmoid(1.702 z)
// dx = dy sg (1 + 1.702 z (1 - sg)); row p of dbias is the sum of dx over group p of rows, down the columns that the
// thread owns anyway, so the sum has one order and needs neither shared memory nor atomics.
// Bound by bytes: x + y an element forward, x + dy + dx backward (bf16: 4 and 6). One exp2 and one reciprocal an
// element: at 16 a clock and multiprocessor they take half the time of the bytes of bf16.
// Refuses: other dtypes, tensors with gaps. Any dx may be the memory of dy or x.
// sass bias_quick_gelu_fwd_kernel<bf16, 8>: LDG.128 = 4, STG.128 = 4, STG = 0, MUFU = 64, LDS = 0, BAR = 0, LOCAL = 0
// sass bias_quick_gelu_bwd_kernel<bf16, 8>: LDG.128 = 8, STG.128 = 4, STG = 0, MUFU = 64, SHFL = 0, BAR = 0, LOCAL = 0
#include <algorithm>

#include "../common/check.h"
#include "../common/math.h"
#include "device.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kRows = 4;               // loaded before the first is computed
constexpr int64_t kMostGroups = 1024;  // of rows, where the caller leaves their number to us

struct Bias {
  const void* data;
  DType dtype;
};

// ---- one element ----

__device__ inline float sigmoid(float z) {
  return __fdividef(1.f, 1.f + ptx::ex2(z * (-kQuickGelu * kLog2e)));
}

template <int V>
__device__ inline Floats<V> bias_of(const Bias& bias, int64_t c) {
  Floats<V> b = {};
  if (bias.data)
#pragma unroll
    for (int k = 0; k < V; ++k)
      b.v[k] = load<1>(bias.data, bias.dtype, c + k).v[0];  // once a thread: width is no matter
  return b;
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
    Floats<V> z[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (n + r < N) z[r] = load_as<T, V>(x, (n + r) * C + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float t = z[r].v[k] + b.v[k];
        z[r].v[k] = t * sigmoid(t);
      }
      if (n + r < N) store_as<T, V>(y, (n + r) * C + c, z[r]);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) bias_quick_gelu_bwd_kernel(T* dx,         // [N, C]
                                                                       float* dbias,  // [P, C] or null, P = gridDim.y
                                                                       const T* dy,   // [N, C]
                                                                       const T* x,    // [N, C]
                                                                       Bias bias,     // [C] or null
                                                                       int64_t N, int64_t C) {
  const int64_t c = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (c >= C) return;
  const Floats<V> b = bias_of<V>(bias, c);
  Floats<V> sum = {};
  const int64_t begin = blockIdx.y * N / gridDim.y, end = (blockIdx.y + 1) * N / gridDim.y;
  for (int64_t n = begin; n < end; n += kRows) {
    Floats<V> z[kRows] = {}, d[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (n + r < end) {
        z[r] = load_as<T, V>(x, (n + r) * C + c);
        d[r] = load_as<T, V>(dy, (n + r) * C + c);
      }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float t = z[r].v[k] + b.v[k], s = sigmoid(t);
        d[r].v[k] *= s * (1.f + kQuickGelu * t * (1.f - s));
        sum.v[k] += n + r < end ? d[r].v[k] : 0.f;
      }
      if (n + r < end) store_as<T, V>(dx, (n + r) * C + c, d[r]);
    }
  }
  if (dbias)
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
  const int64_t C = x.cols(), N = x.rows(), groups = std::min((N + kRows - 1) / kRows, kMostGroups);
  if (N == 0) return;
  const OnDevice device(x);
  by_type(x.dtype, in_sixteens(x.dtype, C, {y, x}), [&]<class T, int V>() {
    LAUNCH((bias_quick_gelu_fwd_kernel<T, V>), dim3(column_blocks(C, V), unsigned(groups)), kThreads, 0, stream,
           y.as<T>(), x.as<T>(), Bias{bias.data, bias.dtype}, N, C);
  });
}

static void bias_quick_gelu_bwd(View dx, View dbias, View dy, View x, View bias, Stream stream) {
  check_gelu(dx, x, bias), check_gelu(dy, x, bias);
  const int64_t C = x.cols(), N = x.rows();
  IGPT_CHECK(!dbias || (dbias.dtype == DType::f32 && dbias.ndim == 2 && dbias.cols() == C && dbias.dense() &&
                        dbias.size[0] >= 1 && dbias.size[0] <= 65535),
             "bias_quick_gelu_bwd: dbias must be float32 [P, C] with P from 1 to 65535");
  const int64_t groups = dbias ? dbias.size[0] : std::min((N + kRows - 1) / kRows, kMostGroups);
  if (C == 0 || groups == 0) return;
  const OnDevice device(x);
  by_type(x.dtype, in_sixteens(x.dtype, C, {dx, dy, x}), [&]<class T, int V>() {
    LAUNCH((bias_quick_gelu_bwd_kernel<T, V>), dim3(column_blocks(C, V), unsigned(groups)), kThreads, 0, stream,
           dx.as<T>(), dbias.as<float>(), dy.as<T>(), x.as<T>(), Bias{bias.data, bias.dtype}, N, C);
  });
}

void fill_activation(Ops& t) {
  t.bias_quick_gelu_fwd = bias_quick_gelu_fwd;
  t.bias_quick_gelu_bwd = bias_quick_gelu_bwd;
}

}  // namespace cuda
}  // namespace igpt
