// One query over one head of a cache, for attention_decode.cpp and decode_step.cpp: scores into a row of floats,
// softmax, weighted sum of the values. Every byte of the cached keys and values is read once.
#pragma once
#include "attention.h"

namespace igpt {
namespace IGPT_ISA {

// Vectors of the output held in registers while the values pass by, times sums of each: eight, to hide the latency of
// an addition. Narrow vectors spend them on width, so that a row of values is read whole.
constexpr int kBlock = kLanes >= 16 ? 4 : 8, kStreams = 8 / kBlock;

// score[t .. t + kLanes) = q . k_t for kLanes keys at once; keys behind the end repeat the last one and are masked
// later.
template <class T>
static inline vf dots(const float* q, const Head<const T>& k, int64_t t, int64_t length, int64_t whole, int64_t D) {
  vf acc[kLanes];
  const T* row[kLanes];
  clear(acc);
  for (int j = 0; j < kLanes; ++j) row[j] = k.row(std::min(t + j, length - 1));
  // A key at a time, so that memory is read in its order: what no cache holds comes faster then.
  for (int j = 0; j < kLanes; ++j)
    for (int64_t c = 0; c < whole; c += kLanes) {
      prefetch(row[j], c);
      acc[j] += load(q + c) * load(row[j] + c);
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
      for (int i = 0; i < vectors; ++i) {
        prefetch(v.row(t + s) + c, i * kLanes);
        acc[s][i] += p[t + s] * load(v.row(t + s) + c + i * kLanes);
      }
  for (; t < length; ++t)
    for (int i = 0; i < vectors; ++i) acc[0][i] += p[t] * load(v.row(t) + c + i * kLanes);
  for (int i = 0; i < vectors; ++i) {
    vf total = acc[0][i];
    for (int s = 1; s < kStreams; ++s) total += acc[s][i];
    store(out + c + i * kLanes, total * inverse);
  }
}

// row [D rounded up to whole vectors] = softmax(scale q K^T) V. query [likewise, zeros behind D] is used up; score has
// room for padded(length) floats.
template <class T>
static void decode_head(float* row, float* query, const Head<const T>& hk, const Head<const T>& hv, int64_t D,
                        int64_t length, float scale, float* score) {
  const int64_t whole = D / kLanes * kLanes, end = padded(length);
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
}

}  // namespace IGPT_ISA
}  // namespace igpt
