// attention_decode:  o = softmax(scale q K^T) V for one query a head over the first `length` rows of a cache
//
// q, o [B, H, 1, D]   k, v [B, H, Tmax, D], any strides, f32 or bf16.   Every byte of the cached keys and values is
// read once: they bound it. A task owns one head: scores into a row of floats, softmax, weighted sum of the values. No
// reduction crosses heads or images, so a batch gives the bits that its images give alone.
#include "attention.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int kKeys = 4;  // keys (or values) in flight at once, to hide the latency of their sums

template <class T>
static void decode_head(const View& out, const View& q, const View& k, const View& v, int64_t bh, int64_t length,
                        float scale, float* score) {
  const int64_t D = q.size[3], whole = D / kLanes * kLanes, vectors = padded(D) / kLanes;
  const Head<const T> hq(q, bh), hk(k, bh), hv(v, bh);
  constexpr int kMax = 128 / kLanes;
  auto part = [&](const T* p, int64_t c) { return c < whole ? load(p + c) : load_n(p + c, D - c); };
  vf query[kMax];
  for (int64_t i = 0; i < vectors; ++i) query[i] = part(hq.row(0), i * kLanes) * (scale * kLog2e);

  float top = -INFINITY;
  for (int64_t t = 0; t < length; t += kKeys) {
    const int64_t n = std::min<int64_t>(kKeys, length - t);
    vf acc[kKeys] = {};
    for (int64_t i = 0; i < vectors; ++i)
      for (int64_t j = 0; j < n; ++j) acc[j] += query[i] * part(hk.row(t + j), i * kLanes);
    for (int64_t j = 0; j < n; ++j) {
      score[t + j] = sum(acc[j]);
      top = score[t + j] > top ? score[t + j] : top;
    }
  }
  const int64_t end = padded(length);
  for (int64_t t = length; t < end; ++t) score[t] = -INFINITY;
  vf total = {};
  for (int64_t t = 0; t < end; t += kLanes) {
    const vf p = exp2(load(score + t) - top);
    total += p;
    store(score + t, p);
  }

  vf acc[kMax] = {};
  for (int64_t t = 0; t < length; ++t)
    for (int64_t i = 0; i < vectors; ++i) acc[i] += score[t] * part(hv.row(t), i * kLanes);
  const float inverse = 1.f / sum(total);
  float row[128];
  for (int64_t i = 0; i < vectors; ++i) store(row + i * kLanes, acc[i] * inverse);
  store_row(Head<T>(out, bh).row(0), row, out.dtype, D);
}

static void attention_decode(View o, View q, View k, View v, int64_t length, float scale, Stream) {
  check_attention(q, k, v);
  check_heads(o, q, "o");
  IGPT_CHECK(q.size[2] == 1 && o.size[2] == 1, "attention_decode: one query a head");
  IGPT_CHECK(length >= 1 && length <= k.size[2], "attention_decode: length must be in 1..%lld", (long long)(k.size[2]));
  const int64_t heads = q.size[0] * q.size[1], stride = padded(length);
  auto scores = scratch<float>(std::min<int64_t>(heads, max_threads()) * stride);
  parallel_for(heads, [&](int64_t bh, int thread) {
    float* score = scores.get() + thread * stride;
    if (q.dtype == DType::f32)
      decode_head<float>(o, q, k, v, bh, length, scale, score);
    else
      decode_head<bf16>(o, q, k, v, bh, length, scale, score);
  });
}

void fill_attention_decode(Ops& t) {
  t.attention_decode = attention_decode;
}

}  // namespace IGPT_ISA
}  // namespace igpt
