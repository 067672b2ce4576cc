// rms_norm:  s = x (+ residual)    rstd = 1 / sqrt(mean(s^2) + eps)    y = s rstd weight        over rows of C elements
//
// x [..., C]   residual, sum like x, maybe of another dtype   weight [C]   y [..., C]   rstd [...] f32.   dtypes: f32,
// bf16, mixed at will. A row is converted to float once, stays in the L1 cache, and is written once: the bytes of x,
// residual, sum and y bound it.
//
// Backward:  g = dy weight    dx = rstd (g - s rstd^2 mean(g s)) (+ dsum)    dweight = sum over rows of (dy s rstd)
//
// dweight is [P, C]: the rows are split into P equal groups, group p sums its own into row p, and row 0 receives their
// sum. P is the caller's choice, so the bits do not depend on the number of threads.
#include "../common/check.h"
#include "parallel.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int64_t kRows = 16;  // rows a task: enough to hide the hand-out, few enough to balance

static float sum_of_squares(const float* s, int64_t Cp) {
  vf acc[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= Cp; c += 4 * kLanes)
    for (int i = 0; i < 4; ++i) {
      const vf t = load(s + c + i * kLanes);
      acc[i] += t * t;
    }
  for (; c < Cp; c += kLanes) {
    const vf t = load(s + c);
    acc[0] += t * t;
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// A row of floats throughout: nothing is converted, so it is read and written where it lies. The tail is one short
// vector.
static float plain_row(float* y, float* total, const float* x, const float* r, const float* w, int64_t C, float eps) {
  const float* s = r ? total : x;
  vf acc[4];
  clear(acc);
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    for (int i = 0; i < 4; ++i) {
      vf t = load(x + c + i * kLanes);
      if (r) store(total + c + i * kLanes, t += load(r + c + i * kLanes));
      acc[i] += t * t;
    }
  for (; c < C; c += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, C - c);
    vf t = load_n(x + c, n);
    if (r) store_n(total + c, t += load_n(r + c, n), n);
    acc[0] += t * t;
  }
  const float scale = 1.f / std::sqrt(sum((acc[0] + acc[1]) + (acc[2] + acc[3])) / float(C) + eps);
  for (c = 0; c + kLanes <= C; c += kLanes) store(y + c, load(s + c) * scale * load(w + c));
  if (c < C) store_n(y + c, load_n(s + c, C - c) * scale * load_n(w + c, C - c), C - c);
  return scale;
}

static void check_norm(const View& y, const View& x, const View& residual, const View& weight) {
  for (const View* v : {&x, &weight, &y, &residual})
    IGPT_CHECK(!*v || is_float(v->dtype), "rms_norm: float32 or bfloat16 only");
  IGPT_CHECK(same_shape(x, y) && (!residual || same_shape(x, residual)), "rms_norm: x, residual and y differ in shape");
  IGPT_CHECK(weight.numel() == x.cols(), "rms_norm: weight must have one element a column");
  IGPT_CHECK(x.dense() && y.dense() && weight.dense() && (!residual || residual.dense()),
             "rms_norm: dense tensors only");
}

static void rms_norm_fwd(View y, View sum_out, View rstd, View x, View residual, View weight, float eps, Stream) {
  check_norm(y, x, residual, weight);
  IGPT_CHECK(!residual == !sum_out, "rms_norm: sum is written exactly when a residual is given");
  IGPT_CHECK(!sum_out || (is_float(sum_out.dtype) && same_shape(sum_out, x) && sum_out.dense()),
             "rms_norm: sum must be dense and shaped like x");
  IGPT_CHECK(rstd.dtype == DType::f32 && rstd.numel() == x.rows(), "rms_norm: rstd must be float32, one a row");
  const int64_t C = x.cols(), N = x.rows(), Cp = padded(C), chunks = (N + kRows - 1) / kRows;
  const auto w = zeros<float>(Cp);
  load_row(w.get(), weight.data, weight.dtype, C);
  const int64_t slots = std::max<int64_t>(1, std::min<int64_t>(max_threads(), chunks));
  auto rows = scratch<float>(slots * 2 * Cp);
  const bool plain = x.dtype == DType::f32 && y.dtype == DType::f32 &&
                     (!residual || (residual.dtype == DType::f32 && sum_out.dtype == DType::f32));
  parallel_for(chunks, [&](int64_t chunk, int thread) {
    for (int64_t n = chunk * kRows; plain && n < N && n < (chunk + 1) * kRows; ++n)
      rstd.as<float>()[n] =
          plain_row(y.as<float>() + n * C, sum_out.as<float>() + (residual ? n * C : 0), x.as<float>() + n * C,
                    residual ? residual.as<float>() + n * C : nullptr, w.get(), C, eps);
    if (plain) return;
    float *s = rows.get() + thread * 2 * Cp, *r = s + Cp;
    for (int64_t n = chunk * kRows; n < N && n < (chunk + 1) * kRows; ++n) {
      load_row(s, row_of(x, n), x.dtype, C);
      std::memset(s + C, 0, size_t(Cp - C) * sizeof(float));
      if (residual) {
        load_row(r, row_of(residual, n), residual.dtype, C);
        std::memset(r + C, 0, size_t(Cp - C) * sizeof(float));
        for (int64_t c = 0; c < Cp; c += kLanes) store(s + c, load(s + c) + load(r + c));
        store_row(row_of(sum_out, n), s, sum_out.dtype, C);
        // What is normalised is what the caller keeps: the sum as rounded to its dtype.
        if (sum_out.dtype != DType::f32) load_row(s, row_of(sum_out, n), sum_out.dtype, C);
      }
      const float scale = 1.f / std::sqrt(sum_of_squares(s, Cp) / float(C) + eps);
      rstd.as<float>()[n] = scale;
      const vf v = splat(scale);
      for (int64_t c = 0; c < Cp; c += kLanes) store(s + c, load(s + c) * v * load(w.get() + c));
      store_row(row_of(y, n), s, y.dtype, C);
    }
  });
}

static void rms_norm_bwd(View dx, View dresidual, View dweight, View dy, View dsum, View s_in, View weight, View rstd,
                         Stream) {
  check_norm(dy, s_in, dsum, weight);
  IGPT_CHECK(same_shape(dx, s_in) && dx.dense() && is_float(dx.dtype),
             "rms_norm_bwd: dx must be dense and shaped like x");
  IGPT_CHECK(!dresidual || (same_shape(dresidual, s_in) && dresidual.dense() && is_float(dresidual.dtype)),
             "rms_norm_bwd: dresidual must be dense and shaped like x");
  IGPT_CHECK(rstd.dtype == DType::f32 && rstd.numel() == s_in.rows(), "rms_norm_bwd: rstd must be float32, one a row");
  IGPT_CHECK(dweight.dtype == DType::f32 && dweight.ndim == 2 && dweight.cols() == s_in.cols() && dweight.dense(),
             "rms_norm_bwd: dweight must be float32 [P, C]");
  const int64_t C = s_in.cols(), N = s_in.rows(), Cp = padded(C), groups = dweight.size[0];
  const auto w = zeros<float>(Cp);
  load_row(w.get(), weight.data, weight.dtype, C);
  const int64_t slots = std::max<int64_t>(1, std::min<int64_t>(max_threads(), groups));
  const auto rows = zeros<float>(slots * 4 * Cp);
  parallel_for(groups, [&](int64_t group, int thread) {
    float *s = rows.get() + thread * 4 * Cp, *g = s + Cp, *d = g + Cp, *dw = d + Cp;
    std::memset(dw, 0, size_t(Cp) * sizeof(float));
    for (int64_t n = group * N / groups; n < (group + 1) * N / groups; ++n) {
      load_row(s, row_of(s_in, n), s_in.dtype, C);
      load_row(g, row_of(dy, n), dy.dtype, C);
      const vf r = splat(rstd.as<float>()[n]);
      vf dot = {};
      for (int64_t c = 0; c < Cp; c += kLanes) {
        const vf sv = load(s + c), gv = load(g + c);
        store(dw + c, load(dw + c) + gv * sv * r);
        const vf gw = gv * load(w.get() + c);
        dot += gw * sv;
        store(g + c, gw);
      }
      const vf k = splat(sum(dot) / float(C)) * r * r;
      for (int64_t c = 0; c < Cp; c += kLanes) store(g + c, r * (load(g + c) - load(s + c) * k));
      if (dsum) {
        load_row(d, row_of(dsum, n), dsum.dtype, C);
        for (int64_t c = 0; c < Cp; c += kLanes) store(g + c, load(g + c) + load(d + c));
      }
      store_row(row_of(dx, n), g, dx.dtype, C);
      if (dresidual) store_row(row_of(dresidual, n), g, dresidual.dtype, C);
    }
    std::memcpy(dweight.as<float>() + group * C, dw, size_t(C) * sizeof(float));
  });
  sum_groups(dweight.as<float>(), groups, C);
}

void fill_norm(Ops& t) {
  t.rms_norm_fwd = rms_norm_fwd;
  t.rms_norm_bwd = rms_norm_bwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
