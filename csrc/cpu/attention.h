// What the attention kernels share: which tiles a pattern has, and how a tile of q, k, v becomes a matrix of units.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../common/check.h"
#include "../common/math.h"
#include "dropout.h"
#include "gemm.h"
#include "parallel.h"

namespace igpt {
namespace IGPT_ISA {

// Where the bits of a tile lie: of each 16 queries and each 16 keys the range from the first to the last that is seen.
// Products skip what lies outside: of 64 x 64 scores with a diagonal four blocks of 16 x 16 are left, of the column of
// sos, which every query sees, one strip. Inside, and around it where products come in larger pieces (kRows, kDepth of
// gemm.h), what is not seen has weight 0, so a NaN there still shows.
struct Extent {
  static constexpr int kGroup = 16, kGroups = kTile / kGroup;  // whole vectors in every instruction set
  struct Range {
    int64_t begin = 0, end = kTile;
    bool operator==(const Range& o) const { return begin == o.begin && end == o.end; }
    int64_t size() const { return end - begin; }
    Range within(const Range& o) const { return {std::max(begin, o.begin), std::min(end, o.end)}; }
    // Widened to multiples of `by`.
    Range to(int64_t by) const { return {begin / by * by, (end + by - 1) / by * by}; }
  };
  Range keys[kGroups], queries[kGroups];  // that 16 queries see, and that see 16 keys: from the first to the last
  Range all_keys, all_queries;

  Extent() = default;  // a full tile
  Extent(const uint64_t* bits, const uint64_t* bits_t) {
    all_keys = ranges(keys, bits), all_queries = ranges(queries, bits_t);
  }
  // body(rows, columns) for each stretch of rows that has the same range of columns; rows end at `all`'s ends.
  template <class F>
  static IGPT_INLINE void each(const Range (&columns)[kGroups], const Range& all, F&& body) {
    for (int g = 0, next; g < kGroups; g = next) {
      for (next = g + 1; next < kGroups && columns[next] == columns[g];) ++next;
      const Range rows = all.within({g * kGroup, next * kGroup});
      if (rows.size() > 0 && columns[g].size() > 0) body(rows, columns[g]);
    }
  }

 private:
  static Range range(uint64_t any) {
    if (!any) return {0, 0};
    return {__builtin_ctzll(any), kTile - __builtin_clzll(any)};
  }
  static Range ranges(Range* found, const uint64_t* words) {
    uint64_t all = 0;
    for (int g = 0; g < kGroups; ++g) {
      uint64_t any = 0;
      for (int r = 0; r < kGroup; ++r) any |= words[g * kGroup + r];
      found[g] = range(any);
      all |= any;
    }
    return range(all);
  }
};

// The tiles of one attention call. Without a mask they are arithmetic; with one they are its lists.
struct Tiles {
  int64_t Tq, Tk, nq, nk;
  bool causal;  // only without a mask: a mask's bits hold causality already
  BlockMaskView mask;

  Tiles(int64_t tq, int64_t tk, bool is_causal, const BlockMaskView& m)
      : Tq(tq), Tk(tk), nq((tq + kTile - 1) / kTile), nk((tk + kTile - 1) / kTile), causal(is_causal && !m), mask(m) {
    IGPT_CHECK(!(is_causal || m) || Tq == Tk, "attention: causal or masked attention needs as many keys as queries");
    uint64_t bits[kTile], bits_t[kTile];
    for (int r = 0; r < kTile; ++r) bits[r] = (2ull << r) - 1, bits_t[r] = ~0ull << r;
    diagonal = Extent(bits, bits_t);
    if (!m) return;
    check_mask();
    extents.reserve(size_t(m.bits.numel() / kTile));
    for (int64_t at = 0; at < m.bits.numel(); at += kTile)
      extents.emplace_back(m.bits.as<uint64_t>() + at, m.bits_t.as<uint64_t>() + at);
  }

  struct Tile {
    int64_t index;  // of the key tile in a row, of the query tile in a column
    int mask;       // -1: no bits
  };
  // Tiles that query tile i sees / that see key tile j.
  int64_t row_count(int64_t i) const {
    return mask ? at(mask.row_start, i + 1) - at(mask.row_start, i) : causal ? i + 1 : nk;
  }
  Tile row_tile(int64_t i, int64_t n) const {
    if (!mask) return {n, -1};
    const int64_t e = at(mask.row_start, i) + n;
    return {at(mask.row_tile, e), at(mask.row_mask, e)};
  }
  int64_t col_count(int64_t j) const {
    return mask ? at(mask.col_start, j + 1) - at(mask.col_start, j) : causal ? nq - j : nq;
  }
  Tile col_tile(int64_t j, int64_t n) const {
    if (!mask) return {causal ? j + n : n, -1};
    const int64_t e = at(mask.col_start, j) + n;
    return {at(mask.col_tile, e), at(mask.col_mask, e)};
  }
  // The last query tile that sees key tile j, which some do.
  int64_t last_query(int64_t j) const { return mask ? at(mask.col_tile, at(mask.col_start, j + 1) - 1) : nq - 1; }
  // How many key tiles there are at most that both a query tile or one before it and it or a later one sees.
  int64_t most_keys() const {
    if (!mask) return nk;
    const auto more = scratch<int32_t>(nq + 1);
    std::fill_n(more.get(), nq + 1, 0);
    for (int64_t j = 0; j < nk; ++j)
      if (col_count(j)) ++more[col_tile(j, 0).index], --more[last_query(j) + 1];
    int32_t now = 0, most = 0;
    for (int64_t i = 0; i < nq; ++i) most = std::max(most, now += more[i]);
    return most;
  }
  // The slot at each place; null: place p has slot p.
  const int32_t* order() const { return mask.order.as<int32_t>(); }
  // True when every query of tile i sees every key of tile j: no bits need looking at.
  bool full(int64_t i, int64_t j, int id) const { return id < 0 && !(causal && i == j) && (j + 1) * kTile <= Tk; }
  const Extent& extent(int64_t i, int64_t j, int id) const {
    return id >= 0 ? extents[size_t(id)] : causal && i == j ? diagonal : whole;
  }
  // Which keys of tile j query r of tile i sees.
  uint64_t row_bits(int64_t i, int64_t j, int id, int64_t r) const {
    uint64_t bits = id < 0 ? ~0ull : mask.bits.as<uint64_t>()[id * kTile + r];
    if (causal && i == j) bits &= (2ull << r) - 1;
    const int64_t keys = Tk - j * kTile;
    return keys < kTile ? bits & ((1ull << keys) - 1) : bits;
  }
  // Which queries of tile i see key r of tile j. Queries behind the end are not masked: their gradients are zero.
  uint64_t col_bits(int64_t i, int64_t j, int id, int64_t r) const {
    if (j * kTile + r >= Tk) return 0;
    uint64_t bits = id < 0 ? ~0ull : mask.bits_t.as<uint64_t>()[id * kTile + r];
    return causal && i == j ? bits & (~0ull << r) : bits;
  }

 private:
  std::vector<Extent> extents;  // of every mask
  Extent whole, diagonal;
  static int at(const View& v, int64_t i) { return v.as<int32_t>()[i]; }
  void check_lists(const View& start, const View& tile, const View& ids, int64_t rows, int64_t cols,
                   int64_t masks) const {
    IGPT_CHECK(start.numel() == rows + 1 && tile.numel() == ids.numel(),
               "attention: the mask's tile lists do not fit the sequence");
    IGPT_CHECK(start.dtype == DType::i32 && tile.dtype == DType::i32 && ids.dtype == DType::i32,
               "attention: mask lists must be int32");
    IGPT_CHECK(at(start, 0) == 0 && at(start, rows) == tile.numel(), "attention: the mask's tile lists are broken");
    for (int64_t i = 0; i < rows; ++i)
      IGPT_CHECK(at(start, i) <= at(start, i + 1), "attention: the mask's tile lists are broken");
    for (int64_t e = 0; e < tile.numel(); ++e)
      IGPT_CHECK(at(tile, e) >= 0 && at(tile, e) < cols && at(ids, e) < masks,
                 "attention: the mask names a tile that does not exist");
  }
  void check_order() const {
    if (!mask.order) return;
    IGPT_CHECK(mask.order.dtype == DType::i32 && mask.order.dense() && mask.order.numel() == Tq,
               "attention: a mask's order must be dense int32, a slot for each token");
    const auto met = scratch<uint8_t>(Tq);
    std::fill_n(met.get(), Tq, uint8_t(0));
    for (int64_t p = 0; p < Tq; ++p) {
      const int slot = at(mask.order, p);
      IGPT_CHECK(slot >= 0 && slot < Tq && !met[slot], "attention: a mask's order must have every slot once");
      met[slot] = 1;
    }
  }
  void check_mask() const {
    const int64_t masks = mask.bits.numel() / kTile;
    IGPT_CHECK(
        mask.bits.dtype == DType::i64 && mask.bits_t.dtype == DType::i64 && mask.bits.numel() == mask.bits_t.numel(),
        "attention: mask bits must be int64 words");
    check_order();
    check_lists(mask.row_start, mask.row_tile, mask.row_mask, nq, nk, masks);
    check_lists(mask.col_start, mask.col_tile, mask.col_mask, nk, nq, masks);
    // Rows in turn meet the entries of each column in turn: the lists are sorted, and name the same tiles.
    const auto met = scratch<int32_t>(nk);
    std::fill_n(met.get(), nk, 0);
    for (int64_t i = 0; i < nq; ++i)
      for (int64_t n = 0; n < row_count(i); ++n) {
        const int64_t j = row_tile(i, n).index, e = met[j]++;
        IGPT_CHECK(e < col_count(j) && col_tile(j, e).index == i && (n == 0 || row_tile(i, n - 1).index < j),
                   "attention: the mask's rows and columns name different tiles, or not in order");
      }
    IGPT_CHECK(mask.row_tile.numel() == mask.col_tile.numel(),
               "attention: the mask's rows and columns name different tiles, or not in order");
  }
};

// Of each part of a mask; without one, of all pairs.
static inline std::vector<Tiles> tiles_of(const View& q, const View& k, bool causal, const MaskParts& mask) {
  std::vector<Tiles> parts;
  if (mask.count == 0) parts.emplace_back(q.size[2], k.size[2], causal, BlockMaskView());
  for (int64_t p = 0; p < mask.count; ++p) parts.emplace_back(q.size[2], k.size[2], causal, mask.part[p]);
  return parts;
}

// One head of a [B, H, T, D] view, its rows by the places of an order where there is one.
template <class T>
struct Head {
  T* data;
  int64_t stride;  // between rows
  const int32_t* order = nullptr;
  Head(T* first, int64_t between) : data(first), stride(between) {}
  Head(const View& v, int64_t bh, const int32_t* places = nullptr)
      : data(v.as<T>() + bh / v.size[1] * v.stride[0] + bh % v.size[1] * v.stride[1]), stride(v.stride[2]),
        order(places) {}
  int64_t slot(int64_t t) const { return order ? order[t] : t; }
  T* row(int64_t t) const { return data + slot(t) * stride; }
  // Tells the cache of row t's use to come, if there is such a row: rows of an order or of a fused buffer are no stream
  // that a processor foresees.
  IGPT_INLINE void ask(int64_t t, int64_t end, int64_t D) const {
    if (t >= end) return;
    for (int64_t c = 0; c < D; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row(t) + c, !std::is_const_v<T>);
  }
};
constexpr int kRowsAhead = 6;  // more would push each other out: rows of a column share a few sets of the cache

// A operand: rows of a tile as they are, [kTile, D / step] units; rows behind the end are zero.
template <class E, class T>
static void pack_rows(typename E::Unit* a, const Head<T>& x, int64_t t, int64_t T_end, int64_t D) {
  const int64_t Ku = D / E::kStep, rows = std::min<int64_t>(kTile, T_end - t);
  for (int64_t r = 0; r < rows; ++r) {
    x.ask(t + r + kRowsAhead, T_end, D);
    const T* p = x.row(t + r);
    for (int64_t k = 0; k < Ku; ++k) a[r * Ku + k] = E::unit(p + k * E::kStep);
  }
  std::memset(a + rows * Ku, 0, size_t((kTile - rows) * Ku) * sizeof(*a));
}

// out[c, r] = in[r, c] for matrices of units: kLanes rows and columns at a time, both multiples of kLanes. in(r, c)
// loads the units of row r from column c on.
template <class Unit, class In>
static IGPT_INLINE void transpose_units(Unit* out, int64_t ldo, int64_t rows, int64_t cols, In&& in) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < cols; c += kLanes) {
      vf v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = in(r + i, c);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(out + (c + i) * ldo + r), v[i]);
    }
}

// B operand of a product along D: the tile transposed, [D / step, kTile] units; columns behind the end are zero.
template <class E, class T>
static void pack_transposed(typename E::Unit* b, const Head<T>& x, int64_t t, int64_t T_end, int64_t D) {
  const int64_t Ku = D / E::kStep, rows = std::min<int64_t>(kTile, T_end - t);
  const int64_t whole_r = rows / kLanes * kLanes, whole_k = Ku / kLanes * kLanes;
  transpose_units(b, kTile, whole_r, whole_k, [&](int64_t r, int64_t k) {
    __builtin_prefetch(x.row(std::min(t + r + kLanes, T_end - 1)) + k * E::kStep);
    return E::units(x.row(t + r) + k * E::kStep);
  });
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t k = r < whole_r ? whole_k : 0; k < Ku; ++k)
      b[k * kTile + r] = r < rows ? E::unit(x.row(t + r) + k * E::kStep) : 0;
}

// B operand of a product along the tokens: [kTile / step, Dp] units, Dp = D rounded up to whole vectors.
template <class E, class T>
static void pack_tokens(typename E::Unit* b, const Head<T>& x, int64_t t, int64_t T_end, int64_t D, int64_t Dp) {
  const int64_t rows = std::min<int64_t>(kTile, T_end - t);
  for (int64_t r = 0; r < kTile; r += 2) {
    for (int e = 0; e < 2; ++e) x.ask(t + r + e + kRowsAhead, T_end, D);
    for (int64_t c = 0; c < Dp; c += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, D - c);
      if (n == kLanes && r + 1 < rows) {
        E::copy_b_pair(b, r / 2, Dp, c, x.row(t + r) + c, x.row(t + r + 1) + c);
        continue;
      }
      vf even = {}, odd = {};
      if (r < rows && n > 0) even = load_upto(x.row(t + r) + c, n);
      if (r + 1 < rows && n > 0) odd = load_upto(x.row(t + r + 1) + c, n);
      E::store_b_pair(b, r / 2, Dp, c, even, odd);
    }
  }
}

// A row of sums leaves: into memory, or on top of what is there. `sums` has room for whole vectors, and is used up.
template <class T>
static inline void leave_row(T* to, float* sums, DType dtype, int64_t D, bool add) {
  for (int64_t c = 0; add && c < D; c += kLanes)
    store(sums + c, load(sums + c) + load_upto(to + c, std::min<int64_t>(kLanes, D - c)));
  store_row(to, sums, dtype, D);
}

static inline void check_heads(const View& v, const View& q, const char* name) {
  IGPT_CHECK(
      v.ndim == 4 && v.size[0] == q.size[0] && v.size[1] == q.size[1] && v.size[3] == q.size[3] && v.dtype == q.dtype,
      "attention: %s must be [B, H, T, D] with q's batch, heads, head dim and dtype", name);
}
static inline void check_attention(const View& q, const View& k, const View& v) {
  IGPT_CHECK(is_float(q.dtype), "attention: float32 or bfloat16 only");
  check_heads(q, q, "q");
  check_heads(k, q, "k");
  check_heads(v, q, "v");
  IGPT_CHECK(k.size[2] == v.size[2], "attention: k and v differ in length");
  IGPT_CHECK(q.size[3] % 8 == 0 && q.size[3] > 0 && q.size[3] <= 128,
             "attention: head dim must be a multiple of 8 up to 128");
}

}  // namespace IGPT_ISA
}  // namespace igpt
