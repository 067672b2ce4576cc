// One query over one head of a cache, for attention_decode.cpp and decode_step.cpp: scores into a row of floats,
// softmax, weighted sum of the values. Every byte of the keys and values that are seen is read once, and no other.
#pragma once
#include "attention.h"

namespace igpt {
namespace IGPT_ISA {

// Vectors of the output held in registers while the values pass by, times sums of each: eight, to hide the latency of
// an addition. Narrow vectors spend them on width, so that a row of values is read whole.
constexpr int kBlock = kLanes >= 16 ? 4 : 8, kStreams = 8 / kBlock;

// What a query sees of a cache: the slots of a list or, without one, the first `count`.
struct Seen {
  int64_t count = 0;
  const int32_t* slot = nullptr;  // [count], then kAhead times the last, which are asked for but not read
};
constexpr int kAhead = 32;  // rows of a list between the one that is read and the one that the cache is asked for

// Where in a cache of so many slots those of the sequence are: by the table of its pages or, without one, at their own.
class Places {
 public:
  Places(const View& pages, int64_t room, int64_t length) : page_(pages.as<int32_t>()), pages_(room / kTile) {
    IGPT_CHECK(!pages || (pages.dtype == DType::i32 && pages.dense() && pages.numel() * kTile >= length),
               "attention_decode: pages must be dense int32, one for each %d of %lld slots", kTile,
               (long long)(length));
    IGPT_CHECK(pages || length <= room, "attention_decode: %lld slots are asked of a cache of %lld",
               (long long)(length), (long long)(room));
  }
  explicit operator bool() const { return page_ != nullptr; }
  // The first slot of a tile.
  int64_t of_tile(int64_t tile) const {
    const int64_t page = page_ ? page_[tile] : tile;
    IGPT_CHECK(!page_ || (page >= 0 && page < pages_), "attention_decode: page %lld is outside the cache's %lld",
               (long long)(page), (long long)(pages_));
    return page * kTile;
  }
  int64_t operator()(int64_t slot) const { return of_tile(slot / kTile) + slot % kTile; }

 private:
  const int32_t* page_;
  int64_t pages_;
};

// The places of what row length - 1 of a mask sees of the first `length` slots, listed in `slots`, which has room for
// kAhead more.
static inline Seen seen_in(const BlockMaskView& mask, const Places& places, int64_t length, int32_t* slots) {
  IGPT_CHECK(!mask.order, "attention_decode: a mask is in raster order");
  const View &start = mask.row_start, &tile = mask.row_tile, &ids = mask.row_mask;
  IGPT_CHECK(start.dtype == DType::i32 && tile.dtype == DType::i32 && ids.dtype == DType::i32 &&
                 mask.bits.dtype == DType::i64 && start.dense() && tile.dense() && ids.dense() && mask.bits.dense() &&
                 tile.numel() == ids.numel(),
             "attention_decode: a mask is dense lists of int32 and dense int64 words");
  const int64_t row = length - 1, i = row / kTile;
  IGPT_CHECK(i + 1 < start.numel(), "attention_decode: the mask has no row %lld", (long long)(row));
  const int64_t begin = start.as<int32_t>()[i], end = start.as<int32_t>()[i + 1];
  IGPT_CHECK(begin >= 0 && begin <= end && end <= tile.numel(), "attention_decode: the mask's tile lists are broken");
  int64_t count = 0, before = -1;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t j = tile.as<int32_t>()[e], id = ids.as<int32_t>()[e], left = length - j * kTile;
    IGPT_CHECK(j > before && id * kTile < mask.bits.numel(), "attention_decode: the mask's tile lists are broken");
    before = j;
    if (left <= 0) break;  // behind the query there is nothing yet
    uint64_t bits = id < 0 ? ~0ull : mask.bits.as<uint64_t>()[id * kTile + row % kTile];
    if (left < kTile) bits &= (1ull << left) - 1;
    for (const int64_t first = bits ? places.of_tile(j) : 0; bits; bits &= bits - 1)
      slots[count++] = int32_t(first + __builtin_ctzll(bits));
  }
  if (count == length && !places) return {count, nullptr};
  for (int a = 0; a < kAhead && count; ++a) slots[count + a] = slots[count - 1];
  return {count, slots};
}

// A head's keys or values: those of the first `count` slots, which neighbours share, stand before its own.
template <class T>
struct Kept {
  Head<const T> own, shared;
  int64_t count;
  explicit Kept(const Head<const T>& all) : own(all), shared(all), count(0) {}
  Kept(const Head<const T>& own, const Head<const T>& shared, int64_t count) : own(own), shared(shared), count(count) {}
  const T* row(int64_t slot) const { return slot < count ? shared.row(slot) : own.row(slot - count); }
};

// The rows that a query sees, by their number, and a word to the cache about those that come later.
template <class T, class From>  // a Head, or Kept
struct FirstRows {
  From from;
  const T* row(int64_t t) const { return from.row(t); }
  void ask(const T* here, int64_t, int64_t c) const { prefetch(here, c); }
};
template <class T>
struct ListedRows {
  Kept<T> kept;
  const int32_t* slot;
  const T* row(int64_t t) const { return kept.row(slot[t]); }
  void ask(const T*, int64_t t, int64_t c) const { prefetch<kLanes, 0>(row(t + kAhead), c); }
};

// score[t .. t + kLanes) = q . k_t for kLanes keys at once; keys behind the end repeat the last one and are masked
// later.
template <class T, int dim, class Rows>
static inline vf dots(const float* q, const Rows& k, int64_t t, int64_t length, int64_t any) {
  const int64_t D = dim ? dim : any, whole = D / kLanes * kLanes;
  vf acc[kLanes];
  const T* row[kLanes];
  clear(acc);
  for (int j = 0; j < kLanes; ++j) row[j] = k.row(std::min(t + j, length - 1));
  // A key at a time, so that memory is read in its order: what no cache holds comes faster then.
  for (int j = 0; j < kLanes; ++j)
    for (int64_t c = 0; c < whole; c += kLanes) {
      k.ask(row[j], std::min(t + j, length - 1), c);
      acc[j] += load(q + c) * load(row[j] + c);
    }
  if (whole < D) {
    const vf qv = load(q + whole);
    for (int j = 0; j < kLanes; ++j) acc[j] += qv * load_n(row[j] + whole, D - whole);
  }
  return sums(acc);
}

// out[c .. c + n lanes) = sum_t p_t v_t for `vectors` whole vectors of the head.
template <int vectors, class Rows>
static inline void mix(float* out, const float* p, const Rows& v, int64_t c, int64_t length, float inverse) {
  vf acc[kStreams][vectors] = {};
  int64_t t = 0;
  for (; t + kStreams <= length; t += kStreams)
    for (int s = 0; s < kStreams; ++s)
      for (int i = 0; i < vectors; ++i) {
        v.ask(v.row(t + s), t + s, c + i * kLanes);
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

// score = q . k_t in base 2, for all keys -> the maximum of each lane. The query is used up.
template <class T, int dim, class Rows>
static inline vf all_dots(float* score, float* query, const Rows& k, int64_t D, int64_t length, float scale) {
  for (int64_t c = 0; c < padded(D); c += kLanes) store(query + c, load(query + c) * scale);
  vf tops = splat(-INFINITY);
  for (int64_t t = 0; t < length; t += kLanes) {
    const vf s = dots<T, dim>(query, k, t, length, D);
    store(score + t, s);
    tops = max(tops, s);  // a repeated key changes no maximum
  }
  return tops;
}

template <class T, class Rows>
static inline void mix_all(float* row, const float* p, const Rows& v, int64_t D, int64_t length, float inverse) {
  const int64_t whole = D / kLanes * kLanes;
  int64_t c = 0;
  for (; c + kBlock * kLanes <= whole; c += kBlock * kLanes) mix<kBlock>(row, p, v, c, length, inverse);
  for (; c < whole; c += kLanes) mix<1>(row, p, v, c, length, inverse);
  if (c < D) {
    vf acc = {};
    for (int64_t t = 0; t < length; ++t) acc += p[t] * load_n(v.row(t) + c, D - c);
    store(row + c, acc * inverse);
  }
}

#if defined(__AVX512BF16__)
// The same for bf16, 32 columns at a time: keys are multiplied as the pairs that they are, by a query of bf16; the two
// values of a pair become floats by a shift and a mask, which is half the work of widening them.
template <class T, int dim, class Rows>
  requires std::is_same_v<T, bf16>
static inline vf all_dots(float* score, float* query, const Rows& k, int64_t D, int64_t length, float scale) {
  constexpr int kMost = dim ? (dim + kPairs - 1) / kPairs : 4;
  vp q[kMost] = {};
  for (int64_t c = 0; c < D; c += kPairs) q[c / kPairs] = to_pairs(load(query + c), load(query + c + kLanes));
  vf tops = splat(-INFINITY);
  for (int64_t t = 0; t < length; t += kLanes) {
    vf acc[kLanes];
    clear(acc);
    for (int j = 0; j < kLanes; ++j) {
      const bf16* row = k.row(std::min(t + j, length - 1));
      for (int64_t c = 0; c < D; c += kPairs) {
        k.ask(row, std::min(t + j, length - 1), c);
        acc[j] = dot_pairs(acc[j], q[c / kPairs], load_pairs_n(row + c, D - c));
      }
    }
    const vf s = sums(acc) * scale;
    store(score + t, s);
    tops = max(tops, s);
  }
  return tops;
}

// out[c .. c + 32 blocks) = sum_t p_t v_t, or as many columns as there are.
template <int blocks, class Rows>
static inline void mix_pairs(float* out, const float* p, const Rows& v, int64_t c, int64_t D, int64_t length,
                             float inverse) {
  vf even[2][blocks] = {}, odd[2][blocks] = {};
  const auto add = [&](int s, int64_t t) {
    const bf16* row = v.row(t);
    for (int b = 0; b < blocks; ++b) {
      v.ask(row, t, c + b * kPairs);
      const auto two = reinterpret_cast<__m512i>(load_pairs_n(row + c + b * kPairs, D - c - b * kPairs));
      even[s][b] += p[t] * reinterpret_cast<vf>(_mm512_slli_epi32(two, 16));
      odd[s][b] += p[t] * reinterpret_cast<vf>(_mm512_and_si512(two, _mm512_set1_epi32(int(0xffff0000u))));
    }
  };
  int64_t t = 0;
  for (; t + 2 <= length; t += 2) add(0, t), add(1, t + 1);
  if (t < length) add(0, t);
  vi first, second;
  for (int i = 0; i < kLanes; ++i) first[i] = i / 2 + i % 2 * kLanes, second[i] = first[i] + kLanes / 2;
  for (int b = 0; b < blocks; ++b) {
    const vf e = (even[0][b] + even[1][b]) * inverse, o = (odd[0][b] + odd[1][b]) * inverse;
    store(out + c + b * kPairs, __builtin_shuffle(e, o, first));
    store(out + c + b * kPairs + kLanes, __builtin_shuffle(e, o, second));
  }
}

template <class T, class Rows>
  requires std::is_same_v<T, bf16>
static inline void mix_all(float* row, const float* p, const Rows& v, int64_t D, int64_t length, float inverse) {
  int64_t c = 0;
  for (; c + 2 * kPairs <= D; c += 2 * kPairs) mix_pairs<2>(row, p, v, c, D, length, inverse);
  for (; c < D; c += kPairs) mix_pairs<1>(row, p, v, c, D, length, inverse);
}
#endif

template <class T, int dim, class Rows>
static void decode_rows(float* row, float* query, const Rows& hk, const Rows& hv, int64_t any, int64_t length,
                        float scale, float* score) {
  const int64_t D = dim ? dim : any, end = padded(length);
  const float top = max(all_dots<T, dim>(score, query, hk, D, length, scale * kLog2e));
  for (int64_t t = length; t < end; ++t) score[t] = -INFINITY;
  vf total = {};
  for (int64_t t = 0; t < end; t += kLanes) {
    const vf p = exp2(load(score + t) - top);
    total += p;
    store(score + t, p);
  }
  mix_all<T>(row, score, hv, D, length, 1.f / sum(total));
}

// row [128] = softmax(scale q K^T) V over the slots that are seen, zeros where none is; so much of it as whole vectors
// take is written. query [128, zeros behind D] is used up; score has room for padded(seen.count) floats.
template <class T>
static void decode_head(float* row, float* query, const Kept<T>& k, const Kept<T>& v, int64_t D, const Seen& seen,
                        float scale, float* score) {
  if (!seen.count) {
    for (int64_t c = 0; c < D; c += kLanes) store(row + c, vf{});
    return;
  }
  // The head dim of most models is known to the compiler, which then writes its short loops out.
  const auto over = [&](auto keys, auto values) {
    D == 64 ? decode_rows<T, 64>(row, query, keys, values, D, seen.count, scale, score)
            : decode_rows<T, 0>(row, query, keys, values, D, seen.count, scale, score);
  };
  if (seen.slot) return over(ListedRows<T>{k, seen.slot}, ListedRows<T>{v, seen.slot});
  if (k.count) return over(FirstRows<T, Kept<T>>{k}, FirstRows<T, Kept<T>>{v});
  using Own = Head<const T>;
  over(FirstRows<T, Own>{k.own}, FirstRows<T, Own>{v.own});
}

}  // namespace IGPT_ISA
}  // namespace igpt
