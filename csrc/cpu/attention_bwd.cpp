// attention_bwd:  dq, dk, dv of attention_fwd, from dout, q, k, v, o and lse
//
// P = exp(scale q k^T - lse)   delta = rowsum(dout o)   dS = scale P (dout v^T - delta)
// dv = P^T dout   dk = dS^T q   dq = dS k
//
// A task owns what it sums: nothing is shared, nothing is added atomically, and the bits do not depend
// on the threads. It owns one head, walks over query tiles i and, inside, over the key tiles j that they see. Tiles are
// transposed (keys down, queries across): so lse and delta are plain vectors, P^T and dS^T are row-major operands of dv
// and dk, and dq^T = k^T dS^T is summed while i lasts. dk and dv are summed in a place that a key tile has from the
// first query tile that sees it to the last: a causal mask without further rules needs a place for every tile, a sparse
// one a few, which stay in the cache. Five products of 2 D flops a score: multiply-adds bound it. With fewer heads than
// threads a task owns some query tiles of a head, for dq, or some key tiles, for dk and dv: seven products, and the
// same sums in the same order. attention_dropout_bwd:  the same for weights W = P mask / (1 - p), causal: dv = W^T
// dout, and W / P scales dout v^T.
#include "attention.h"

namespace igpt {
namespace IGPT_ISA {

template <class E>
struct BwdScratch {  // one thread's; Ku = D / step, Tu = 64 / step
  using Unit = typename E::Unit;
  int64_t n_places;
  Scratch<Unit> qt, dot, qn, don;  // a query tile: [Ku, 64] q and dout transposed   [Tu, Dp] the same along the tokens
  Scratch<Unit> k, v, kt;          // a place's key tile: [places, 64, Ku]   [places, 64, Ku]   [places, Dp, Tu]
  Scratch<float> dk, dv;           // [places, 64, Dp]
  Scratch<Unit> ds_b;              // [Tu, 64]
  Scratch<float> dq, s, dp, rows;  // [Dp, 64]   [64, 64]   [64, 64], rows' beginnings taken over by P and dS   [64, Dp]
  Scratch<float> lse, delta;       // [64]   [64]
  Scratch<uint32_t> low, high;     // [64]   [64]: dropout's bits of the queries
  Scratch<int32_t> place, unused;  // [key tiles] the place that it has, or -1   [places] those that nobody has
  BwdScratch(int64_t places, int64_t nk, int64_t D, int64_t Dp)
      : n_places(places), qt(scratch<Unit>(kTile * D / E::kStep)), dot(scratch<Unit>(kTile * D / E::kStep)),
        qn(scratch<Unit>(kTile * Dp / E::kStep)), don(scratch<Unit>(kTile * Dp / E::kStep)),
        k(scratch<Unit>(places * kTile * D / E::kStep)), v(scratch<Unit>(places * kTile * D / E::kStep)),
        kt(scratch<Unit>(places * kTile * Dp / E::kStep)), dk(scratch<float>(places * kTile * Dp)),
        dv(scratch<float>(places * kTile * Dp)), ds_b(scratch<Unit>(kTile * kTile / E::kStep)),
        dq(scratch<float>(Dp * kTile)), s(scratch<float>(kTile * kTile)), dp(scratch<float>(kTile * kTile)),
        rows(scratch<float>(kTile * Dp)), lse(scratch<float>(kTile)), delta(scratch<float>(kTile)),
        low(scratch<uint32_t>(kTile)), high(scratch<uint32_t>(kTile)), place(scratch<int32_t>(nk)),
        unused(scratch<int32_t>(places)) {}
  // Rows of P^T and dS^T, kTile units from one to the next.
  Unit* p(int64_t key) { return reinterpret_cast<Unit*>(s.get() + key * kTile); }
  Unit* ds(int64_t key) { return reinterpret_cast<Unit*>(dp.get() + key * kTile); }
};

// S^T, dP^T -> P^T and dS^T, for keys `key` and `key + 1` of the tile (a pair is what the B operand of dq^T stores).
template <class E>
static inline void gradient_rows(BwdScratch<E>& w, int64_t key, int64_t j, float scale, uint64_t bits0, uint64_t bits1,
                                 const Dropout& dropout) {
  const uint64_t bits[2] = {bits0, bits1};
  for (int64_t c = 0; c < kTile; c += 2 * kLanes) {
    vf p[2][2] = {}, ds[2][2] = {};  // [key][vector]
    for (int n = 0; n < 2; ++n) {
      const int64_t q = c + n * kLanes;
      if (((bits0 | bits1) >> q & ((1ull << kLanes) - 1)) == 0) {  // S and dP are not there
        E::store_b_pair(w.ds_b.get(), key / 2, kTile, q, vf{}, vf{});
        continue;
      }
      const vf lse = load(w.lse.get() + q), delta = load(w.delta.get() + q);
      for (int e = 0; e < 2; ++e) {
        const int64_t at = (key + e) * kTile + q;
        vf v = E::exp(load(w.s.get() + at) * (scale * E::kBase) - lse), dp = load(w.dp.get() + at);
        if (bits[e] != ~0ull) v = keep(uint32_t(bits[e] >> q), v, vf{});
        p[e][n] = v;
        if (dropout) {
          vu low, high;
          std::memcpy(&low, w.low.get() + q, sizeof low);
          std::memcpy(&high, w.high.get() + q, sizeof high);
          const vf weights = dropout.weights(low, high, vu{} + uint32_t(j * kTile + key + e));
          dp *= weights, p[e][n] *= weights;
        }
        ds[e][n] = v * (dp - delta) * scale;
      }
      E::store_b_pair(w.ds_b.get(), key / 2, kTile, q, ds[0][n], ds[1][n]);
    }
    for (int e = 0; e < 2; ++e) {
      E::store_a(w.p(key + e), c, p[e][0], p[e][1]);  // behind what is read
      E::store_a(w.ds(key + e), c, ds[e][0], ds[e][1]);
    }
  }
}

// The tiles of a head that a task owns: it sums dq of the queries, dk and dv of the keys, or both of all.
struct Share {
  Extent::Range queries, keys;  // [tiles]
  bool dq, dkdv;

  static Share all(const Tiles& tiles) { return {{0, tiles.nq}, {0, tiles.nk}, true, true}; }
  // `count` shares at most, of about as many tiles each: of the queries, or of the keys.
  static std::vector<Share> divide(const Tiles& tiles, bool by_keys, int64_t count) {
    const int64_t n = by_keys ? tiles.nk : tiles.nq;
    const auto work = [&](int64_t at) { return 1 + (by_keys ? tiles.col_count(at) : tiles.row_count(at)); };
    int64_t total = 0, done = 0;
    for (int64_t at = 0; at < n; ++at) total += work(at);
    std::vector<Share> shares;
    for (int64_t at = 0, begin = 0; at < n; ++at) {
      done += work(at);
      if (at + 1 < n && done * count < total * int64_t(shares.size() + 1)) continue;
      Share share = all(tiles);
      (by_keys ? share.keys : share.queries) = {begin, at + 1};
      (by_keys ? share.dq : share.dkdv) = false;
      shares.push_back(share);
      begin = at + 1;
    }
    return shares;
  }
};

// A share of one head and of one part of its mask. Where it adds, another part has been before.
template <class E, class T>
struct BwdHead {
  using Unit = typename E::Unit;
  using Range = Extent::Range;
  static constexpr int64_t kKeys = std::max<int64_t>(2, E::kRows);  // keys go in pairs
  static constexpr int64_t kDepth = std::max<int64_t>(2, E::kDepth);
  BwdScratch<E>& w;
  const Tiles& tiles;
  const Share share;
  const int64_t bh, D, Dp = padded(D), Ku = D / E::kStep, Tu = kTile / E::kStep;
  const Head<T> dq, dk, dv;
  const Head<const T> dout, q, k, v, o;
  const float* lse;
  float* deltas;  // [queries] by slot: found with dq of the first part, for all that follows
  const DType dtype;
  const float scale;
  const bool add;
  const Dropout& dropout;
  int64_t unused = 0;  // places

  // Packs key tile j into a place.
  int64_t open(int64_t j) {
    const int64_t at = w.place[j] = w.unused[--unused];
    pack_rows<E>(w.k.get() + at * kTile * Ku, k, j * kTile, tiles.Tk, D);
    pack_rows<E>(w.v.get() + at * kTile * Ku, v, j * kTile, tiles.Tk, D);
    float *dk_j = w.dk.get() + at * kTile * Dp, *dv_j = w.dv.get() + at * kTile * Dp;
    if (share.dq) {  // k^T as an A operand: row c holds column c, tokens along K. pack_tokens makes it, transposed.
      Unit* tokens = reinterpret_cast<Unit*>(dk_j);  // not in use yet
      pack_tokens<E>(tokens, k, j * kTile, tiles.Tk, D, Dp);
      transpose_units(w.kt.get() + at * Dp * Tu, Tu, Tu, Dp,
                      [&](int64_t r, int64_t c) { return load(reinterpret_cast<float*>(tokens + r * Dp + c)); });
    }
    std::fill_n(dk_j, kTile * Dp, 0.f);
    std::fill_n(dv_j, kTile * Dp, 0.f);
    return at;
  }
  // Key tile j leaves its place, and so do dk and dv.
  void close(int64_t j) {
    const int64_t at = w.place[j];
    for (int64_t r = 0; share.dkdv && r < std::min<int64_t>(kTile, tiles.Tk - j * kTile); ++r) {
      for (const auto& x : {dk, dv}) x.ask(j * kTile + r + kRowsAhead, tiles.Tk, D);
      leave_row(dk.row(j * kTile + r), w.dk.get() + (at * kTile + r) * Dp, dtype, D, add);
      leave_row(dv.row(j * kTile + r), w.dv.get() + (at * kTile + r) * Dp, dtype, D, add);
    }
    w.place[j] = -1;
    w.unused[unused++] = int32_t(at);
  }

  // delta of a tile's 64 queries, by the very product that makes dP: where a softmax has one term, O is V to the bit;
  // then the difference of dP and delta is exactly zero, and so is dq.
  void row_sums(const Unit* o_rows) {
    constexpr int64_t kBlock = 16;
    for (int64_t r = 0; r < kTile; r += kBlock) {
      gemm<E, false>(kBlock, kBlock, Ku, w.s.get(), kBlock, o_rows + r * Ku, Ku, w.dot.get() + r, kTile);
      for (int64_t e = 0; e < kBlock; ++e) w.delta[r + e] = w.s[e * kBlock + e];
    }
  }

  void pack_queries(int64_t i) {
    pack_transposed<E>(w.qt.get(), q, i * kTile, tiles.Tq, D);
    pack_transposed<E>(w.dot.get(), dout, i * kTile, tiles.Tq, D);
    if (share.dkdv) {
      pack_tokens<E>(w.qn.get(), q, i * kTile, tiles.Tq, D, Dp);
      pack_tokens<E>(w.don.get(), dout, i * kTile, tiles.Tq, D, Dp);
    }
    const bool finds = share.dq && !add;
    if (finds) {
      Unit* rows = reinterpret_cast<Unit*>(w.dq.get());  // not in use yet
      pack_rows<E>(rows, o, i * kTile, tiles.Tq, D);
      row_sums(rows);
    }
    if (dropout) dropout.queries(w.low.get(), w.high.get(), bh, i * kTile, kTile);
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t t = i * kTile + r, slot = t < tiles.Tq ? q.slot(t) : t;
      w.lse[r] = t < tiles.Tq ? lse[slot] * E::kBase : 0.f;
      if (finds)
        deltas[slot] = w.delta[r];
      else
        w.delta[r] = deltas[slot];
    }
    std::fill_n(w.dq.get(), Dp * kTile, 0.f);
  }

  void meet(int64_t i, int64_t j, int mask, int64_t at) {
    const bool full = tiles.full(i, j, mask);
    const Extent& extent = tiles.extent(i, j, mask);
    const Range all = extent.all_keys.to(kDepth);
    const Unit *k_j = w.k.get() + at * kTile * Ku, *v_j = w.v.get() + at * kTile * Ku, *kt = w.kt.get() + at * Dp * Tu;
    float *dk_j = w.dk.get() + at * kTile * Dp, *dv_j = w.dv.get() + at * kTile * Dp;
    Extent::each(extent.keys, {0, kTile}, [&](Range queries, Range seen) {
      const Range keys = seen.to(kKeys);
      const int64_t r = keys.begin, c = queries.begin, to = r * kTile + c;
      gemm<E, false>(keys.size(), queries.size(), Ku, w.s.get() + to, kTile, k_j + r * Ku, Ku, w.qt.get() + c, kTile);
      gemm<E, false>(keys.size(), queries.size(), Ku, w.dp.get() + to, kTile, v_j + r * Ku, Ku, w.dot.get() + c, kTile);
    });
    for (int64_t r = all.begin; r < all.end; r += 2)
      gradient_rows<E>(w, r, j, scale, full ? ~0ull : tiles.col_bits(i, j, mask, r),
                       full ? ~0ull : tiles.col_bits(i, j, mask, r + 1), dropout);
    if (share.dkdv)
      Extent::each(extent.queries, all, [&](Range keys, Range seeing) {
        const Range units = seeing.to(E::kDepth);
        const int64_t r = keys.begin, u = units.begin / E::kStep, n_units = units.size() / E::kStep;
        gemm<E, true>(keys.size(), Dp, n_units, dv_j + r * Dp, Dp, w.p(r) + u, kTile, w.don.get() + u * Dp, Dp);
        gemm<E, true>(keys.size(), Dp, n_units, dk_j + r * Dp, Dp, w.ds(r) + u, kTile, w.qn.get() + u * Dp, Dp);
      });
    if (share.dq)
      Extent::each(extent.keys, {0, kTile}, [&](Range queries, Range seen) {
        const Range units = seen.to(E::kDepth);
        const int64_t u = units.begin / E::kStep, n_units = units.size() / E::kStep, c = queries.begin;
        gemm<E, true>(Dp, queries.size(), n_units, w.dq.get() + c, kTile, kt + u, Tu, w.ds_b.get() + u * kTile + c,
                      kTile);
      });
  }

  void store_queries(int64_t i) {
    float* rows = w.rows.get();
    transpose_units(rows, Dp, Dp, kTile, [&](int64_t c, int64_t r) { return load(w.dq.get() + c * kTile + r); });
    for (int64_t r = 0; r < std::min<int64_t>(kTile, tiles.Tq - i * kTile); ++r) {
      dq.ask(i * kTile + r + kRowsAhead, tiles.Tq, D);
      leave_row(dq.row(i * kTile + r), rows + r * Dp, dtype, D, add);
    }
  }

  void run() {
    const MatrixUnit used;
    for (int64_t at = 0; at < w.n_places; ++at) w.unused[unused++] = int32_t(at);
    std::fill_n(w.place.get(), tiles.nk, -1);
    for (int64_t i = share.queries.begin; i < share.queries.end; ++i) {
      int64_t n = 0, end = tiles.row_count(i);
      while (n < end && tiles.row_tile(i, n).index < share.keys.begin) ++n;
      while (n < end && tiles.row_tile(i, end - 1).index >= share.keys.end) --end;
      if (n == end && (add || !share.dq)) continue;
      pack_queries(i);
      for (; n < end; ++n) {
        const auto [j, mask] = tiles.row_tile(i, n);
        meet(i, j, mask, w.place[j] < 0 ? open(j) : w.place[j]);
        if (tiles.last_query(j) == i) close(j);
      }
      if (share.dq) store_queries(i);
    }
    for (int64_t j = share.keys.begin; j < share.keys.end && share.dkdv && !add; ++j)
      if (tiles.col_count(j) == 0) open(j), close(j);  // zeros
  }
};

// Whether threads that would have no head of their own are worth two products more, and packing again: 1.4 to 1.7 times
// the work of undivided heads where it was measured.
static bool divide_heads(int64_t heads, int64_t threads, int64_t tiles) {
  constexpr int64_t kFewest = 4;  // tiles of a head that are worth it
  const int64_t rounds = (heads + threads - 1) / threads;
  return tiles >= kFewest && 5 * heads < 3 * threads * rounds;
}

template <class E, class T>
static void backward(const View& dq, const View& dk, const View& dv, const View& dout, const View& q, const View& k,
                     const View& v, const View& o, const View& lse, const std::vector<Tiles>& parts, float scale,
                     const Dropout& dropout) {
  const int64_t heads = q.size[0] * q.size[1], D = q.size[3], nq = parts[0].nq, nk = parts[0].nk;
  const int64_t threads = max_threads();
  int64_t places = 1;
  for (const Tiles& tiles : parts) places = std::max(places, tiles.most_keys());
  std::vector<BwdScratch<E>> workers;
  const auto deltas = scratch<float>(heads * nq * kTile);
  const auto run = [&](int64_t bh, int thread, const Tiles& tiles, const Share& share) {
    const int32_t* by = tiles.order();
    BwdHead<E, T>{.w = workers[size_t(thread)],
                  .tiles = tiles,
                  .share = share,
                  .bh = bh,
                  .D = D,
                  .dq = {dq, bh, by},
                  .dk = {dk, bh, by},
                  .dv = {dv, bh, by},
                  .dout = {dout, bh, by},
                  .q = {q, bh, by},
                  .k = {k, bh, by},
                  .v = {v, bh, by},
                  .o = {o, bh, by},
                  .lse = lse.as<float>() + bh * tiles.Tq,
                  .deltas = deltas.get() + bh * nq * kTile,
                  .dtype = q.dtype,
                  .scale = scale,
                  .add = &tiles != &parts[0],
                  .dropout = dropout}
        .run();
  };
  const bool divided = divide_heads(heads, threads, std::min(nq, nk));
  for (int64_t i = 0; i < (divided ? threads : std::min(heads, threads)); ++i)
    workers.emplace_back(places, nk, D, padded(D));
  if (!divided) {
    parallel_for(heads, [&](int64_t bh, int thread) {
      for (const Tiles& tiles : parts) run(bh, thread, tiles, Share::all(tiles));
    });
    return;
  }
  for (const Tiles& tiles : parts)
    for (const bool by_keys : {false, true}) {
      const auto shares = Share::divide(tiles, by_keys, (2 * threads + heads - 1) / heads);
      parallel_for(heads * int64_t(shares.size()),
                   [&](int64_t n, int thread) { run(n % heads, thread, tiles, shares[size_t(n / heads)]); });
    }
}

static void dispatch(const View& dq, const View& dk, const View& dv, const View& dout, const View& q, const View& k,
                     const View& v, const View& o, const View& lse, const MaskParts& mask, bool causal, float scale,
                     const Dropout& dropout) {
  check_attention(q, k, v);
  for (const View* x : {&dq, &dk, &dv, &dout, &o}) check_heads(*x, q, "every gradient");
  IGPT_CHECK(same_shape(dq, q) && same_shape(dk, k) && same_shape(dv, v) && same_shape(dout, q) && same_shape(o, q),
             "attention_bwd: gradients must be shaped like what they belong to");
  IGPT_CHECK(lse.dtype == DType::f32 && lse.dense() && lse.numel() == q.size[0] * q.size[1] * q.size[2],
             "attention_bwd: lse must be dense float32 [B, H, Tq]");
  const auto parts = tiles_of(q, k, causal, mask);
  if (q.dtype == DType::f32) return backward<F32Units, float>(dq, dk, dv, dout, q, k, v, o, lse, parts, scale, dropout);
  backward<HalfUnits, bf16>(dq, dk, dv, dout, q, k, v, o, lse, parts, scale, dropout);
}

static void attention_bwd(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse, View,
                          MaskParts mask, bool causal, float scale, Stream) {
  dispatch(dq, dk, dv, dout, q, k, v, o, lse, mask, causal, scale, Dropout());
}

static void attention_dropout_bwd(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse,
                                  float scale, float p, int64_t seed, Stream) {
  dispatch(dq, dk, dv, dout, q, k, v, o, lse, MaskParts(), true, scale, Dropout(p, seed));
}

void fill_attention_bwd(Ops& t) {
  t.attention_bwd = attention_bwd;
  t.attention_dropout_bwd = attention_dropout_bwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
