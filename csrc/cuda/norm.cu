// rms_norm:  s = x (+ residual)    rstd = 1 / sqrt(mean(s^2) + eps)    y = s rstd weight        over rows of C elements
//
// x, dx, y, dy [N, C]   residual, sum, dsum, s [N, C]   weight [C]   rstd [N] f32   dweight [P, C] f32.   dtypes: f32,
// bf16, f16, mixed at will; fast where the branch (x, y) has one and the stream (residual, sum) one, the same or f32.
// Bound by bytes: C (x + y) a row, plus C (residual + sum); backward C (s + dy + dx), plus C dsum.
//
// A lane holds 16 elements of a row, a warp 512, and ceil(C / 512) warps are the team of a row: sums are shuffles, and
// a team of more than one warp meets at a barrier. Forward: a team loads its two rows whole before it touches
// them, and is done; bytes in flight come from the many teams of a multiprocessor. Backward:
// g = dy weight    dx = rstd (g - s rstd^2 mean(g s)) (+ dsum)    dweight = sum over rows of dy s rstd
// Block p owns a group of rows, its teams take turns at them. A lane sums dweight of its columns in registers, a block
// the sums of its teams in order, row p of dweight, and a kernel after it those of all blocks, row 0. The next row is
// on its way (cp.async, into places that only the lane itself reads) while this one is worked on.
// Refuses rows of more than 12,288 columns (forward) or 4,096 (backward).
// sass rms_norm_fwd_kernel<bf16, bf16, 8>: LDG.128 >= 8, STG.128 = 8, STG.64 = 0, LOCAL = 0
// sass rms_norm_bwd_kernel<bf16, bf16, 8>: LDG.128 = 0, STG.128 = 4, STG.64 = 0, LOCAL = 0
#include <algorithm>

#include "../common/check.h"
#include "groups.cuh"
#include "norm.cuh"

namespace igpt {
namespace cuda {

constexpr int kHeld = 16;                  // elements of a row a lane
constexpr int kSpan = 32 * kHeld;          // and a warp
constexpr int kForwardWarps = 24;          // a block, at most; as many make the widest row
constexpr int kBackwardWarps = 12;         // two such blocks leave each thread 80 registers
constexpr int kWidestBackward = 8;         // warps a row: two stages of these, all floats, are 96 KB
constexpr int kStages = 2;                 // rows a team of the backward pass has in shared memory: this and the next
constexpr size_t kMostShared = 96 * 1024;  // what a block of every card from sm_80 on may have

template <class T>
constexpr int kRowsOf = std::is_same_v<T, Any> ? 1 : 2;  // a team of the forward pass

// ---- kernels ----

template <class X, class S, int V>
__global__ void __launch_bounds__(32 * kForwardWarps) rms_norm_fwd_kernel(Matrix<X> y,      // [N, C]
                                                                          Matrix<S> sum,    // [N, C] or null, as added
                                                                          float* rstd,      // [N]
                                                                          Matrix<S> x,      // [N, C]
                                                                          Matrix<X> added,  // [N, C] or null
                                                                          Typed weight,     // [C]
                                                                          int64_t N, int C, float eps) {
  constexpr int kVectors = kHeld / V, kRows = kRowsOf<X>;
  STATIC_SMEM(float, parts, kRows* kForwardWarps);
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, warps = blockDim.x / 32;  // of the team threadIdx.y
  const int first = part * kSpan + lane * V;                                            // vector j: first + 32 V j
  const int64_t n = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * kRows, at = n * C + first;

  Raw<S, V> s[kRows][kVectors];
  Raw<X, V> more[kRows][kVectors];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      s[r][j] = x.template fetch<V>(at + r * int64_t(C) + 32 * V * j, n + r < N && first + 32 * V * j < C);
  if (added.data) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
        more[r][j] = added.template fetch<V>(at + r * int64_t(C) + 32 * V * j, n + r < N && first + 32 * V * j < C);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        Floats<V> t = floats_in<S, V>(s[r][j]);
        const Floats<V> m = floats_in<X, V>(more[r][j]);
#pragma unroll
        for (int k = 0; k < V; ++k) t.v[k] += m.v[k];
        s[r][j] = sum.template rounded<V>(t);  // what is normalised is what the caller keeps
        if (n + r < N && first + 32 * V * j < C) sum.template put<V>(at + r * int64_t(C) + 32 * V * j, s[r][j]);
      }
  }

  float squares[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const Floats<V> t = floats_in<S, V>(s[r][j]);
#pragma unroll
      for (int k = 0; k < V; ++k) squares[r] += t.v[k] * t.v[k];
    }
    squares[r] = warp_sum(squares[r]);
  }
  if (warps > 1) {
    float* mine = parts + threadIdx.y * warps * kRows;
    if (lane == 0)
#pragma unroll
      for (int r = 0; r < kRows; ++r) mine[r * warps + part] = squares[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) squares[r] = warp_sum(lane < warps ? mine[r * warps + lane] : 0.f);
  }

  const float inverse = 1.f / float(C);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    squares[r] = rsqrtf(squares[r] * inverse + eps);
    if (n + r < N && threadIdx.x == 0) rstd[n + r] = squares[r];
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (first + 32 * V * j >= C) continue;
    const Floats<V> w = load<V>(weight.data, weight.dtype, first + 32 * V * j);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Floats<V> t = floats_in<S, V>(s[r][j]);
#pragma unroll
      for (int k = 0; k < V; ++k) t.v[k] *= squares[r] * w.v[k];
      if (n + r < N) y.template store<V>(at + r * int64_t(C) + 32 * V * j, t);
    }
  }
}

template <class T>
constexpr int kBlocksOf = std::is_same_v<T, Any> ? 1 : 2;  // a multiprocessor

template <class X, class S, int V>
__host__ __device__ constexpr size_t stage_bytes(bool dsum) {  // of one warp
  return kSpan / V * (sizeof(Raw<X, V>) + (dsum ? 2 : 1) * sizeof(Raw<S, V>));
}

template <class X, class S, int V>
__global__ void __launch_bounds__(32 * kBackwardWarps, kBlocksOf<X>)
    rms_norm_bwd_kernel(Matrix<X> dx,         // [N, C] or null
                        Matrix<S> dresidual,  // [N, C] or null
                        float* dweight,       // [P, C]
                        Matrix<X> dy,         // [N, C]
                        Matrix<S> dsum,       // [N, C] or null
                        Matrix<S> s_in,       // [N, C]
                        Typed weight,         // [C]
                        const float* rstd,    // [N]
                        int64_t N, int C) {
  constexpr int kVectors = kHeld / V;
  DYN_SMEM(char, smem);
  STATIC_SMEM(float, parts, kStages* kBackwardWarps);
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, warps = blockDim.x / 32;  // of the team
  const int team = threadIdx.y, teams = blockDim.y, warp = team * warps + part, first = part * kSpan + lane * V;
  const int64_t begin = blockIdx.x * N / gridDim.x, end = (blockIdx.x + 1) * N / gridDim.x;

  // A lane's places in its warp's stages: vector j is 32 j further.
  char* mine = smem + warp * kStages * stage_bytes<X, S, V>(dsum.data);
  auto staged_s = [&](int stage) {
    return reinterpret_cast<Raw<S, V>*>(mine + stage * stage_bytes<X, S, V>(dsum.data)) + lane;
  };
  auto staged_dy = [&](int stage) { return reinterpret_cast<Raw<X, V>*>(staged_s(stage) - lane + kSpan / V) + lane; };
  auto staged_dsum = [&](int stage) {
    return reinterpret_cast<Raw<S, V>*>(staged_dy(stage) - lane + kSpan / V) + lane;
  };
  auto fetch = [&](int64_t n, int stage) {  // → rstd
    if (n < end)
#pragma unroll(V == 1 ? 1 : kVectors)  // one by one is slow anyway, and need not be long
      for (int j = 0; j < kVectors; ++j) {
        if (first + 32 * V * j >= C) continue;
        s_in.template stage<V>(staged_s(stage) + 32 * j, n * C + first + 32 * V * j);
        dy.template stage<V>(staged_dy(stage) + 32 * j, n * C + first + 32 * V * j);
        if (dsum.data) dsum.template stage<V>(staged_dsum(stage) + 32 * j, n * C + first + 32 * V * j);
      }
    ptx::cp_async_commit();
    return n < end ? rstd[n] : 0.f;
  };

  Floats<V> dw[kVectors] = {}, w[kVectors] = {};
  float next = fetch(begin + team, 0);
#pragma unroll
  for (int j = 0; j < kVectors; ++j)
    if (first + 32 * V * j < C) w[j] = load<V>(weight.data, weight.dtype, first + 32 * V * j);

  const float inverse = 1.f / float(C);
  int stage = 0;
  for (int64_t n = begin + team; n < end; n += teams, stage ^= 1) {
    const float r = next;
    next = fetch(n + teams, stage ^ 1);
    ptx::cp_async_wait<1>();
    float dot = 0.f;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (first + 32 * V * j >= C) continue;
      const Floats<V> s = floats_in<S, V>(staged_s(stage)[32 * j]), d = floats_in<X, V>(staged_dy(stage)[32 * j]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float ds = d.v[k] * s.v[k];
        dw[j].v[k] += ds * r;
        dot += ds * w[j].v[k];
      }
    }
    dot = warp_sum(dot);
    if (warps > 1) {  // two places a warp, since one barrier a row does not tell when all have read
      if (lane == 0) parts[stage * kBackwardWarps + warp] = dot;
      ptx::bar_sync(1 + team, 32 * warps);
      dot = warp_sum(lane < warps ? parts[stage * kBackwardWarps + team * warps + lane] : 0.f);
    }
    const float mean = dot * inverse * r * r * r;  // of g s, as s takes it
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (first + 32 * V * j >= C) continue;
      const Floats<V> s = floats_in<S, V>(staged_s(stage)[32 * j]), d = floats_in<X, V>(staged_dy(stage)[32 * j]);
      Floats<V> out = {};
      if (dsum.data) out = floats_in<S, V>(staged_dsum(stage)[32 * j]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        out.v[k] += r * (d.v[k] * w[j].v[k]);
        out.v[k] -= s.v[k] * mean;
      }
      if (dx.data) dx.template store<V>(n * C + first + 32 * V * j, out);
      if (dresidual.data) dresidual.template store<V>(n * C + first + 32 * V * j, out);
    }
  }

  ptx::cp_async_wait<0>();
  __syncthreads();                              // the stages are read: their memory takes each team's dweight
  float* all = reinterpret_cast<float*>(smem);  // [teams, C]
#pragma unroll
  for (int j = 0; j < kVectors; ++j)
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (first + 32 * V * j < C) all[team * C + first + 32 * V * j + k] = dw[j].v[k];
  __syncthreads();
  for (int c = 32 * warp + lane; c < C; c += 32 * warps * teams) {
    float total = 0.f;
    for (int t = 0; t < teams; ++t) total += all[t * C + c];
    dweight[int64_t(blockIdx.x) * C + c] = total;
  }
}

// ---- launchers ----

static void check_norm(const View& x, const View& other, const char* name) {
  IGPT_CHECK(!other || (same_shape(x, other) && other.dense() && is_gpu_float(other.dtype)),
             "rms_norm: %s must be float32, bfloat16 or float16, dense and shaped like x", name);
}

static void check_weight(const View& weight, int64_t C, int most) {
  IGPT_CHECK(weight.numel() == C && weight.dense() && is_gpu_float(weight.dtype) && C <= most,
             "rms_norm: weight must be dense float32, bfloat16 or float16, one a column, at most %d columns", most);
}

static int warps_of_row(int64_t C) {
  return std::max(1, int((C + kSpan - 1) / kSpan));
}

static void rms_norm_fwd(View y, View sum, View rstd, View x, View residual, View weight, float eps, Stream stream) {
  const int64_t C = x.cols(), N = x.rows();
  check_norm(x, x, "x"), check_norm(x, y, "y"), check_norm(x, sum, "sum"), check_norm(x, residual, "residual");
  IGPT_CHECK(!residual == !sum, "rms_norm: sum is written exactly when a residual is given");
  IGPT_CHECK(rstd.dtype == DType::f32 && rstd.numel() == N, "rms_norm: rstd must be float32, one a row");
  check_weight(weight, C, kForwardWarps * kSpan);
  if (N == 0) return;
  const OnDevice device(x);
  const View in = residual ? residual : x, added = residual ? x : View{};
  const int warps = warps_of_row(C), teams = std::max(1, 4 / warps);
  by_types({y, added}, {in, sum}, weight, C, [&]<class X, class S, int V>() {
    const int rows = teams * kRowsOf<X>;
    LAUNCH((rms_norm_fwd_kernel<X, S, V>), unsigned((N + rows - 1) / rows), dim3(32 * warps, teams), 0, stream,
           Matrix<X>(y), Matrix<S>(sum), rstd.as<float>(), Matrix<S>(in), Matrix<X>(added),
           (Typed{weight.data, weight.dtype}), N, int(C), eps);
  });
}

static void rms_norm_bwd(View dx, View dresidual, View dweight, View dy, View dsum, View s, View weight, View rstd,
                         Stream stream) {
  const int64_t C = s.cols(), N = s.rows();
  check_norm(s, s, "s"), check_norm(s, dx, "dx"), check_norm(s, dresidual, "dresidual"), check_norm(s, dy, "dy");
  check_norm(s, dsum, "dsum");
  IGPT_CHECK(rstd.dtype == DType::f32 && rstd.numel() == N, "rms_norm_bwd: rstd must be float32, one a row");
  check_weight(weight, C, kWidestBackward * kSpan);
  IGPT_CHECK(dweight.dtype == DType::f32 && dweight.ndim == 2 && dweight.cols() == C && dweight.dense(),
             "rms_norm_bwd: dweight must be float32 [P, C]");
  const OnDevice device(s);
  if (!dresidual && dx.dtype != dy.dtype) std::swap(dx, dresidual);  // the kernel writes what is there
  const int warps = warps_of_row(C);
  by_types({dy, dx}, {s, dresidual, dsum}, weight, C, [&]<class X, class S, int V>() {
    const size_t bytes = warps * kStages * stage_bytes<X, S, V>(bool(dsum));  // of a team
    const int teams = std::max(1, std::min(kBackwardWarps / warps, int(kMostShared / bytes)));
    allow_shared(rms_norm_bwd_kernel<X, S, V>, kMostShared);  // the same from any thread, with dsum and without
    LAUNCH((rms_norm_bwd_kernel<X, S, V>), unsigned(dweight.size[0]), dim3(32 * warps, teams), teams * bytes, stream,
           Matrix<X>(dx), Matrix<S>(dresidual), dweight.as<float>(), Matrix<X>(dy), Matrix<S>(dsum), Matrix<S>(s),
           (Typed{weight.data, weight.dtype}), rstd.as<float>(), N, int(C));
  });
  sum_groups(dweight, stream);
}

void fill_norm(Ops& t) {
  t.rms_norm_fwd = rms_norm_fwd;
  t.rms_norm_bwd = rms_norm_bwd;
}

}  // namespace cuda
}  // namespace igpt
