// attention_decode:  o = softmax(scale q K^T) V for one query a head over the first `length` rows of a cache
//
// q, o [B, H, 1, D]   k, v [B, H, Tmax, D], any strides, f32 or bf16.   Every byte of the cached keys and values is
// read once: they bound it. A task owns one head: scores into a row of floats, softmax, weighted sum of the values. No
// reduction crosses heads or images, so a batch gives the bits that its images give alone.
#include "attention.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int kBlock = 4;    // vectors of the output held in registers while the values pass by
constexpr int kStreams = 2;  // sums of each, to hide the latency of an addition

// score[t .. t + kLanes) = q . k_t for kLanes keys at once; keys behind the end repeat the last one and are masked
// later.
template <class T>
static inline vf dots(const float* q, const Head<const T>& k, int64_t t, int64_t length, int64_t whole, int64_t D) {
  vf acc[kLanes] = {};
  const T* row[kLanes];
  for (int j = 0; j < kLanes; ++j) row[j] = k.row(std::min(t + j, length - 1));
  for (int64_t c = 0; c < whole; c += kLanes) {
    const vf qv = load(q + c);
    for (int j = 0; j < kLanes; ++j) acc[j] += qv * load(row[j] + c);
  }
  if (whole < D) {
    const vf qv = load(q + whole);
    for (int j = 0; j < kLanes; ++j) acc[j] += qv * load_n(row[j] + whole, D - whole);
  }
  return sums(acc);
}

// out[c .. c + n lanes) = sum_t p_t v_t for `vectors` whole vectors of the head.
template <int vectors, class T>
static inline void mix(float* out, const float* p, const Head<const T>& v, int64_t c, int64_t length, float inverse) {
  vf acc[kStreams][vectors] = {};
  int64_t t = 0;
  for (; t + kStreams <= length; t += kStreams)
    for (int s = 0; s < kStreams; ++s)
      for (int i = 0; i < vectors; ++i) acc[s][i] += p[t + s] * load(v.row(t + s) + c + i * kLanes);
  for (; t < length; ++t)
    for (int i = 0; i < vectors; ++i) acc[0][i] += p[t] * load(v.row(t) + c + i * kLanes);
  for (int i = 0; i < vectors; ++i) store(out + c + i * kLanes, (acc[0][i] + acc[1][i]) * inverse);
}

template <class T>
static void decode_head(const View& out, const View& q, const View& k, const View& v, int64_t bh, int64_t length,
                        float scale, float* score) {
  const int64_t D = q.size[3], whole = D / kLanes * kLanes, end = padded(length);
  const Head<const T> hq(q, bh), hk(k, bh), hv(v, bh);
  float query[128] = {}, row[128];
  load_row(query, hq.row(0), q.dtype, D);
  for (int64_t c = 0; c < padded(D); c += kLanes) store(query + c, load(query + c) * (scale * kLog2e));

  vf tops = splat(-INFINITY);
  for (int64_t t = 0; t < end; t += kLanes) {
    const vf s = dots<T>(query, hk, t, length, whole, D);
    store(score + t, s);
    tops = max(tops, s);  // a repeated key changes no maximum
  }
  for (int64_t t = length; t < end; ++t) score[t] = -INFINITY;
  const float top = max(tops);
  vf total = {};
  for (int64_t t = 0; t < end; t += kLanes) {
    const vf p = exp2(load(score + t) - top);
    total += p;
    store(score + t, p);
  }
  const float inverse = 1.f / sum(total);

  int64_t c = 0;
  for (; c + kBlock * kLanes <= whole; c += kBlock * kLanes) mix<kBlock, T>(row, score, hv, c, length, inverse);
  for (; c < whole; c += kLanes) mix<1, T>(row, score, hv, c, length, inverse);
  if (c < D) {
    vf acc = {};
    for (int64_t t = 0; t < length; ++t) acc += score[t] * load_n(hv.row(t) + c, D - c);
    store(row + c, acc * inverse);
  }
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
