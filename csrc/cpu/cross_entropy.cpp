// cross_entropy:  lse = log sum exp(logits)    loss = lse - logits[target]        one value a row, natural logarithm
//
// logits [..., V] f32 or bf16   targets [...] i64   loss, lse [...] f32.   Bound by the bytes of the logits.
// Backward:  dlogits = (softmax(logits) - onehot(target)) dloss;  dlogits may be the same memory as logits.
// A target outside 0..V-1 is refused before anything is written.
#include "../common/check.h"
#include "../common/math.h"
#include "parallel.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int64_t kRows = 32;

static void check_rows(const View& logits, const View& targets, std::initializer_list<View> of_rows) {
  IGPT_CHECK(is_float(logits.dtype), "cross_entropy: logits must be float32 or bfloat16");
  IGPT_CHECK(targets.dtype == DType::i64, "cross_entropy: targets must be int64");
  IGPT_CHECK(targets.numel() == logits.rows(), "cross_entropy: one target a row of logits");
  IGPT_CHECK(logits.dense() && targets.dense(), "cross_entropy: dense tensors only");
  for (const View& v : of_rows)
    IGPT_CHECK(v.dtype == DType::f32 && v.dense() && v.numel() == logits.rows(),
               "cross_entropy: loss, its gradient and lse must be dense float32, one a row");
  const int64_t V = logits.cols();
  for (int64_t n = 0; n < targets.numel(); ++n) {
    const int64_t t = targets.as<int64_t>()[n];
    IGPT_CHECK(t >= 0 && t < V, "cross_entropy: target %lld at row %lld is outside 0..%lld", (long long)(t),
               (long long)(n), (long long)(V - 1));
  }
}

static float log_sum_exp(const float* row, int64_t V) {
  const int64_t whole = V / kLanes * kLanes;
  vf top = splat(-INFINITY);
  for (int64_t c = 0; c < whole; c += kLanes) top = max(top, load(row + c));
  float m = max(top);
  for (int64_t c = whole; c < V; ++c) m = row[c] > m ? row[c] : m;
  vf acc = {};
  for (int64_t c = 0; c < whole; c += kLanes) acc += exp2((load(row + c) - m) * kLog2e);
  float total = sum(acc);
  for (int64_t c = whole; c < V; ++c) total += std::exp(row[c] - m);
  return m + std::log(total);
}

static void cross_entropy_fwd(View loss, View lse, View logits, View targets, Stream) {
  check_rows(logits, targets, {loss, lse});
  const int64_t N = logits.rows(), V = logits.cols(), Vp = padded(V), chunks = (N + kRows - 1) / kRows;
  auto rows = scratch<float>(std::min<int64_t>(max_threads(), chunks) * Vp);
  parallel_for(chunks, [&](int64_t chunk, int thread) {
    float* row = rows.get() + thread * Vp;
    for (int64_t n = chunk * kRows; n < N && n < (chunk + 1) * kRows; ++n) {
      load_row(row, row_of(logits, n), logits.dtype, V);
      const float l = log_sum_exp(row, V);
      lse.as<float>()[n] = l;
      loss.as<float>()[n] = l - row[targets.as<int64_t>()[n]];
    }
  });
}

static void cross_entropy_bwd(View dlogits, View dloss, View logits, View targets, View lse, Stream) {
  check_rows(logits, targets, {dloss, lse});
  IGPT_CHECK(same_shape(dlogits, logits) && dlogits.dtype == logits.dtype && dlogits.dense(),
             "cross_entropy_bwd: dlogits must be shaped like logits");
  const int64_t N = logits.rows(), V = logits.cols(), Vp = padded(V), chunks = (N + kRows - 1) / kRows;
  auto rows = scratch<float>(std::min<int64_t>(max_threads(), chunks) * Vp);
  parallel_for(chunks, [&](int64_t chunk, int thread) {
    float* row = rows.get() + thread * Vp;
    for (int64_t n = chunk * kRows; n < N && n < (chunk + 1) * kRows; ++n) {
      load_row(row, row_of(logits, n), logits.dtype, V);
      std::memset(row + V, 0, size_t(Vp - V) * sizeof(float));
      const float l = lse.as<float>()[n], g = dloss.as<float>()[n];
      for (int64_t c = 0; c < Vp; c += kLanes) store(row + c, exp2((load(row + c) - l) * kLog2e) * g);
      row[targets.as<int64_t>()[n]] -= g;
      store_row(row_of(dlogits, n), row, dlogits.dtype, V);
    }
  });
}

void fill_cross_entropy(Ops& t) {
  t.cross_entropy_fwd = cross_entropy_fwd;
  t.cross_entropy_bwd = cross_entropy_bwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
