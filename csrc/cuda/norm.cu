// rms_norm:  s = x (+ residual)    rstd = 1 / sqrt(mean(s^2) + eps)    y = s rstd weight        over rows of C elements
//
// x [N, C]   residual, sum [N, C], maybe of another dtype   weight [C]   y [N, C]   rstd [N] f32.   dtypes: f32, bf16,
// f16, mixed at will. One block a row; the row waits in shared memory as floats between its two passes, so that device
// memory sees each element once. Bound by bytes: C (x + y) a row, plus C (residual + sum). Backward:  g = dy weight dx
// = rstd (g - s rstd^2 mean(g s)) (+ dsum); block p owns a group of rows, sums their dy s rstd in shared memory and
// writes row p of dweight [P, C]. Refuses rows of more than 12,256 columns (forward) or 4,085 (backward).
// sass rms_norm_fwd_kernel<4>: LDG = 0, STG = 0, BAR = 0, LOCAL = 0
// sass rms_norm_bwd_kernel<4>: LDG = 0, STG = 0, BAR = 0, LOCAL = 0
#include "../common/check.h"
#include "device.cuh"
#include "launch.h"

namespace igpt {
namespace cuda {

constexpr int kThreads = 128;
// Shared memory that every card gives without asking: 48 KB, less the 128 bytes of block_sum. One row of floats, or
// three.
constexpr int kForwardColumns = (48 * 1024 - 128) / 4, kBackwardColumns = kForwardColumns / 3;

struct Typed {
  void* data;
  DType dtype;
};
static Typed typed(const View& v) {
  return {v.data, v.dtype};
}

template <int V>
__global__ void rms_norm_fwd_kernel(Typed y,         // [N, C]
                                    Typed sum,       // [N, C] or null
                                    float* rstd,     // [N]
                                    Typed x,         // [N, C]
                                    Typed residual,  // [N, C] or null
                                    Typed weight,    // [C]
                                    int C, float eps) {
  DYN_SMEM(float, s);  // [C]
  STATIC_SMEM(float, warps, 32);
  const int64_t row = int64_t(blockIdx.x) * C;

  float squares = 0.f;
  for (int c = threadIdx.x * V; c < C; c += kThreads * V) {
    Floats<V> t = load<V>(x.data, x.dtype, row + c);
    if (residual.data) {
      const Floats<V> r = load<V>(residual.data, residual.dtype, row + c);
#pragma unroll
      for (int k = 0; k < V; ++k) t.v[k] += r.v[k];
      store<V>(sum.data, sum.dtype, row + c, t);
      t = load<V>(sum.data, sum.dtype, row + c);  // what is normalised is what the caller keeps, as rounded
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      squares += t.v[k] * t.v[k];
      s[c + k] = t.v[k];
    }
  }

  const float scale = rsqrtf(block_sum(squares, warps) / float(C) + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = scale;

  for (int c = threadIdx.x * V; c < C; c += kThreads * V) {  // each thread reads back what it wrote itself
    Floats<V> w = load<V>(weight.data, weight.dtype, c);
#pragma unroll
    for (int k = 0; k < V; ++k) w.v[k] *= s[c + k] * scale;
    store<V>(y.data, y.dtype, row + c, w);
  }
}

template <int V>
__global__ void rms_norm_bwd_kernel(Typed dx,           // [N, C]
                                    Typed dresidual,    // [N, C] or null
                                    float* dweight,     // [P, C], P = gridDim.x
                                    Typed dy,           // [N, C]
                                    Typed dsum,         // [N, C] or null
                                    Typed s_in,         // [N, C]
                                    Typed weight,       // [C]
                                    const float* rstd,  // [N]
                                    int64_t N, int C) {
  DYN_SMEM(float, smem);
  STATIC_SMEM(float, warps, 32);
  float *s = smem, *g = smem + C, *dw = smem + 2 * C;  // each thread touches only its own columns of the three
  for (int c = threadIdx.x * V; c < C; c += kThreads * V)
#pragma unroll
    for (int k = 0; k < V; ++k) dw[c + k] = 0.f;

  const int64_t begin = blockIdx.x * N / gridDim.x, end = (blockIdx.x + 1) * N / gridDim.x;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = n * C;
    const float r = rstd[n];
    float dot = 0.f;
    for (int c = threadIdx.x * V; c < C; c += kThreads * V) {
      const Floats<V> sv = load<V>(s_in.data, s_in.dtype, row + c), d = load<V>(dy.data, dy.dtype, row + c);
      const Floats<V> w = load<V>(weight.data, weight.dtype, c);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        dw[c + k] += d.v[k] * sv.v[k] * r;
        const float gw = d.v[k] * w.v[k];
        dot += gw * sv.v[k];
        s[c + k] = sv.v[k];
        g[c + k] = gw;
      }
    }
    const float mean = block_sum(dot, warps) / float(C) * r * r;
    for (int c = threadIdx.x * V; c < C; c += kThreads * V) {
      Floats<V> d;
#pragma unroll
      for (int k = 0; k < V; ++k) d.v[k] = r * (g[c + k] - s[c + k] * mean);
      if (dsum.data) {
        const Floats<V> more = load<V>(dsum.data, dsum.dtype, row + c);
#pragma unroll
        for (int k = 0; k < V; ++k) d.v[k] += more.v[k];
      }
      store<V>(dx.data, dx.dtype, row + c, d);
      if (dresidual.data) store<V>(dresidual.data, dresidual.dtype, row + c, d);
    }
  }
  for (int c = threadIdx.x * V; c < C; c += kThreads * V)
#pragma unroll
    for (int k = 0; k < V; ++k) dweight[int64_t(blockIdx.x) * C + c + k] = dw[c + k];
}

static void check_norm(const View& x, const View& other, const char* name) {
  IGPT_CHECK(!other || (same_shape(x, other) && other.dense() && is_gpu_float(other.dtype)),
             "rms_norm: %s must be float32, bfloat16 or float16, dense and shaped like x", name);
}

static void check_weight(const View& weight, int64_t C, int most) {
  IGPT_CHECK(weight.numel() == C && weight.dense() && is_gpu_float(weight.dtype) && C <= most,
             "rms_norm: weight must be dense float32, bfloat16 or float16, one a column, at most %d columns", most);
}

// Vectors of four need columns in fours and addresses to match (torch's allocations are aligned, slices may not be).
static bool in_fours(int64_t C, std::initializer_list<View> views) {
  bool ok = C % 4 == 0;
  for (const View& v : views) ok = ok && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  return ok;
}

static void rms_norm_fwd(View y, View sum, View rstd, View x, View residual, View weight, float eps, Stream stream) {
  const int64_t C = x.cols(), N = x.rows();
  check_norm(x, x, "x"), check_norm(x, y, "y"), check_norm(x, sum, "sum"), check_norm(x, residual, "residual");
  IGPT_CHECK(!residual == !sum, "rms_norm: sum is written exactly when a residual is given");
  IGPT_CHECK(rstd.dtype == DType::f32 && rstd.numel() == N, "rms_norm: rstd must be float32, one a row");
  check_weight(weight, C, kForwardColumns);
  if (N == 0) return;
  const OnDevice device(x);
  const auto kernel = in_fours(C, {y, sum, x, residual, weight}) ? rms_norm_fwd_kernel<4> : rms_norm_fwd_kernel<1>;
  LAUNCH(kernel, unsigned(N), kThreads, C * sizeof(float), stream, typed(y), typed(sum), rstd.as<float>(), typed(x),
         typed(residual), typed(weight), int(C), eps);
}

static void rms_norm_bwd(View dx, View dresidual, View dweight, View dy, View dsum, View s, View weight, View rstd,
                         Stream stream) {
  const int64_t C = s.cols(), N = s.rows();
  check_norm(s, s, "s"), check_norm(s, dx, "dx"), check_norm(s, dresidual, "dresidual"), check_norm(s, dy, "dy");
  check_norm(s, dsum, "dsum");
  IGPT_CHECK(rstd.dtype == DType::f32 && rstd.numel() == N, "rms_norm_bwd: rstd must be float32, one a row");
  check_weight(weight, C, kBackwardColumns);
  IGPT_CHECK(dweight.dtype == DType::f32 && dweight.ndim == 2 && dweight.cols() == C && dweight.dense(),
             "rms_norm_bwd: dweight must be float32 [P, C]");
  const OnDevice device(s);
  const auto kernel =
      in_fours(C, {dx, dresidual, dy, dsum, s, weight}) ? rms_norm_bwd_kernel<4> : rms_norm_bwd_kernel<1>;
  LAUNCH(kernel, unsigned(dweight.size[0]), kThreads, 3 * C * sizeof(float), stream, typed(dx), typed(dresidual),
         dweight.as<float>(), typed(dy), typed(dsum), typed(s), typed(weight), rstd.as<float>(), N, int(C));
}

void fill_norm(Ops& t) {
  t.rms_norm_fwd = rms_norm_fwd;
  t.rms_norm_bwd = rms_norm_bwd;
}

}  // namespace cuda
}  // namespace igpt
