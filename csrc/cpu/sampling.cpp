// sample_tokens: one token a row, where the distribution function of softmax(logits / temperature) exceeds a uniform
//
// logits [N, V] f32 or bf16   uniforms [N] f64   tokens [N] i64.   All in double: a token is decided by a comparison of
// sums, and V = 512 exponentials a row are nothing beside the step that made the logits. top_k keeps the k largest,
// top_p then the smallest set of the largest whose share of what is left reaches it; equals are kept lowest index
// first. Temperature 0: the largest logit, the first of equals. -1 for a row with NaN, +inf, or nothing but -inf.
#include <algorithm>

#include "../common/check.h"
#include "parallel.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int64_t kRows = 4;  // a task

struct Rule {
  double temperature, top_p;
  int64_t top_k;
};

// Zeroes the p of every token that the rule does not keep. order [V] is scratch.
static void cut(double* p, int32_t* order, int64_t V, const float* z, const Rule& rule) {
  const int64_t k = rule.top_k ? std::min(rule.top_k, V) : V;
  const auto before = [z](int32_t a, int32_t b) { return z[a] != z[b] ? z[a] > z[b] : a < b; };
  for (int64_t i = 0; i < V; ++i) order[i] = int32_t(i);
  if (k < V) std::nth_element(order, order + k, order + V, before);
  for (int64_t i = k; i < V; ++i) p[order[i]] = 0;
  if (rule.top_p >= 1) return;  // at 1 rounding alone would decide about the tail
  std::sort(order, order + k, before);
  double whole = 0, mass = 0;
  for (int64_t i = 0; i < k; ++i) whole += p[order[i]];
  for (int64_t i = 0; i < k; ++i) {
    const double here = p[order[i]];
    if (!(mass < rule.top_p * whole)) p[order[i]] = 0;  // what comes before has reached top_p already
    mass += here;
  }
}

static int64_t draw(double* p, int32_t* order, const float* z, int64_t V, double uniform, const Rule& rule) {
  float top = -INFINITY;
  int64_t first = 0;
  for (int64_t i = 0; i < V; ++i) {
    if (!(z[i] <= top)) top = z[i], first = i;
    if (top != top) return -1;
  }
  if (!std::isfinite(top)) return -1;
  if (rule.temperature == 0) return first;
  for (int64_t i = 0; i < V; ++i) p[i] = std::exp((double(z[i]) - double(top)) / rule.temperature);
  if (rule.top_k || rule.top_p < 1) cut(p, order, V, z, rule);
  double total = 0, below = 0;
  for (int64_t i = 0; i < V; ++i) total += p[i];
  int64_t last = 0;  // the last possible token, should rounding step past it
  for (int64_t i = 0; i < V; ++i) {
    below += p[i];
    if (below > uniform * total) return i;
    if (p[i] > 0) last = i;
  }
  return last;
}

static void sample_tokens(View tokens, View logits, View uniforms, double temperature, int64_t top_k, double top_p,
                          Stream) {
  IGPT_CHECK(is_float(logits.dtype) && logits.dense(), "sample_tokens: logits must be dense float32 or bfloat16");
  IGPT_CHECK(uniforms.dtype == DType::f64 && uniforms.dense() && uniforms.numel() == logits.rows(),
             "sample_tokens: uniforms must be float64, one a row");
  IGPT_CHECK(tokens.dtype == DType::i64 && tokens.dense() && tokens.numel() == logits.rows(),
             "sample_tokens: tokens must be int64, one a row");
  IGPT_CHECK(temperature >= 0 && top_k >= 0 && top_p > 0, "sample_tokens: an option is out of range");
  const int64_t N = logits.rows(), V = logits.cols(), slots = std::min<int64_t>(N / kRows + 1, max_threads());
  const Rule rule{temperature, top_p, top_k};
  auto p = scratch<double>(slots * V);
  auto z = scratch<float>(slots * padded(V));
  auto order = scratch<int32_t>(slots * V);
  parallel_for((N + kRows - 1) / kRows, [&](int64_t chunk, int thread) {
    float* const row = z.get() + thread * padded(V);
    for (int64_t n = chunk * kRows; n < std::min((chunk + 1) * kRows, N); ++n) {
      load_row(row, row_of(logits, n), logits.dtype, V);
      tokens.as<int64_t>()[n] =
          draw(p.get() + thread * V, order.get() + thread * V, row, V, uniforms.as<double>()[n], rule);
    }
  });
}

void fill_sampling(Ops& t) {
  t.sample_tokens = sample_tokens;
}

}  // namespace IGPT_ISA
}  // namespace igpt
