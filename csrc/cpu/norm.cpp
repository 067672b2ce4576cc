// rms_norm:  s = x (+ residual)    rstd = 1 / sqrt(mean(s^2) + eps)    y = s rstd weight        over rows of C elements
//
// x [..., C]   residual, sum like x, maybe of another dtype   weight [C]   y [..., C]   rstd [...] f32.   dtypes: f32,
// bf16, mixed at will; sum, dsum and dresidual have the residual's. A row is read where it lies, the second time out of
// the L1 cache, and written once: the bytes of x, residual, sum and y bound it.
//
// Backward:  g = dy weight    dx = rstd (g - s rstd^2 mean(g s)) (+ dsum)    dweight = sum over rows of (dy s rstd)
//
// dweight is [P, C]: the rows are split into P equal groups, group p sums its own into row p, and row 0 receives their
// sum. P is the caller's choice, so the bits do not depend on the number of threads.
#include "../common/check.h"
#include "parallel.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int64_t kTask = 32 * 1024;  // elements: enough to hide the hand-out, few enough to balance
constexpr int kSums = 4;              // that run side by side, for an addition takes as many cycles

// body(c, n, i) for the n columns from c on, a vector or what is left of a row; i is the sum whose turn it is.
template <class F>
static IGPT_INLINE void columns(int64_t C, F&& body) {
  int64_t c = 0;
  for (; c + kSums * kLanes <= C; c += kSums * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) body(c + i * kLanes, int64_t(kLanes), i);
  for (; c < C; c += kLanes) body(c, std::min<int64_t>(kLanes, C - c), 0);
}

static IGPT_INLINE float total(const vf (&part)[kSums]) {
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

// One row. What is normalised is what the caller keeps: the sum as rounded to its dtype. Returns rstd.
template <class X, class S, class Y>
static float forward_row(Y* y, S* kept, const X* x, const S* residual, const float* w, int64_t C, float eps) {
  vf squares[kSums];
  clear(squares);
  columns(C, [&](int64_t c, int64_t n, int i) IGPT_INLINED {
    vf s = load_upto(x + c, n);
    if (residual) {
      store_upto(kept + c, s + load_upto(residual + c, n), n);
      s = load_upto(kept + c, n);
    }
    squares[i] += s * s;
  });
  const float rstd = 1.f / std::sqrt(total(squares) / float(C) + eps);
  columns(C, [&](int64_t c, int64_t n, int) IGPT_INLINED {
    const vf s = residual ? load_upto(kept + c, n) : load_upto(x + c, n);
    store_upto(y + c, s * rstd * load_upto(w + c, n), n);
  });
  return rstd;
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
  IGPT_CHECK(!sum_out || (sum_out.dtype == residual.dtype && same_shape(sum_out, x) && sum_out.dense()),
             "rms_norm: sum must be dense and shaped like x, and of the residual's dtype");
  IGPT_CHECK(rstd.dtype == DType::f32 && rstd.numel() == x.rows(), "rms_norm: rstd must be float32, one a row");
  const int64_t C = x.cols(), N = x.rows();
  const auto w = floats_of(weight, C);
  const auto run = [&](auto xs, auto sums, auto ys) {
    parallel_chunks(N, std::max<int64_t>(1, kTask / std::max<int64_t>(1, C)), [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t n = begin; n < end; ++n)
        rstd.as<float>()[n] =
            forward_row(row_of<decltype(ys)>(y, n), row_of<decltype(sums)>(sum_out, n), row_of<decltype(xs)>(x, n),
                        row_of<decltype(sums)>(residual, n), w.get(), C, eps);
    });
  };
  by_dtype(run, x.dtype, residual ? residual.dtype : x.dtype, y.dtype);
}

// One row, and its share of dweight.
template <class G, class S, class X>
static void backward_row(X* dx, S* dresidual, float* dweight, const G* dy, const S* dsum, const S* s, const float* w,
                         float rstd, int64_t C) {
  vf dots[kSums];
  clear(dots);
  columns(C, [&](int64_t c, int64_t n, int i) IGPT_INLINED {
    const vf product = load_upto(dy + c, n) * load_upto(s + c, n);
    store_upto(dweight + c, load_upto(dweight + c, n) + product * rstd, n);
    dots[i] += product * load_upto(w + c, n);
  });
  const float k = total(dots) / float(C) * rstd * rstd;
  columns(C, [&](int64_t c, int64_t n, int) IGPT_INLINED {
    vf d = rstd * (load_upto(dy + c, n) * load_upto(w + c, n) - load_upto(s + c, n) * k);
    if (dsum) d += load_upto(dsum + c, n);
    store_upto(dx + c, d, n);
    if (dresidual) store_upto(dresidual + c, d, n);
  });
}

static void rms_norm_bwd(View dx, View dresidual, View dweight, View dy, View dsum, View s_in, View weight, View rstd,
                         Stream) {
  check_norm(dy, s_in, dsum, weight);
  IGPT_CHECK(same_shape(dx, s_in) && dx.dense() && is_float(dx.dtype),
             "rms_norm_bwd: dx must be dense and shaped like x");
  IGPT_CHECK(!dresidual || (same_shape(dresidual, s_in) && dresidual.dense() && dresidual.dtype == s_in.dtype),
             "rms_norm_bwd: dresidual must be dense, shaped like the sum, and of its dtype");
  IGPT_CHECK(!dsum || dsum.dtype == s_in.dtype, "rms_norm_bwd: dsum must be of the sum's dtype");
  IGPT_CHECK(rstd.dtype == DType::f32 && rstd.numel() == s_in.rows(), "rms_norm_bwd: rstd must be float32, one a row");
  IGPT_CHECK(dweight.dtype == DType::f32 && dweight.ndim == 2 && dweight.cols() == s_in.cols() && dweight.dense(),
             "rms_norm_bwd: dweight must be float32 [P, C]");
  const int64_t C = s_in.cols(), N = s_in.rows(), groups = dweight.size[0];
  const auto w = floats_of(weight, C);
  const auto run = [&](auto dys, auto sums, auto dxs) {
    parallel_for(groups, [&](int64_t group, int) {
      float* dw = row_of<float>(dweight, group);
      std::memset(dw, 0, size_t(C) * sizeof(float));
      for (int64_t n = group * N / groups; n < (group + 1) * N / groups; ++n)
        backward_row(row_of<decltype(dxs)>(dx, n), row_of<decltype(sums)>(dresidual, n), dw,
                     row_of<decltype(dys)>(dy, n), row_of<decltype(sums)>(dsum, n), row_of<decltype(sums)>(s_in, n),
                     w.get(), rstd.as<float>()[n], C);
    });
  };
  by_dtype(run, dy.dtype, s_in.dtype, dx.dtype);
  sum_groups(dweight.as<float>(), groups, C);
}

void fill_norm(Ops& t) {
  t.rms_norm_fwd = rms_norm_fwd;
  t.rms_norm_bwd = rms_norm_bwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
