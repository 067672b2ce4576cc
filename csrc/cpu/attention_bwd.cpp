// attention_bwd:  dq, dk, dv of attention_fwd, from dout, q, k, v, o and lse
//
// With P = exp(scale q k^T - lse), delta = rowsum(dout o), dS = scale P (dout v^T - delta):  dv = P^T dout   dk = dS^T
// q   dq = dS k. A task owns one head, so nothing is shared, nothing is added atomically, and the bits do not depend on
// the threads. It packs q and dout once, then walks over key tiles j and, inside, over the query tiles i that see them,
// transposed (keys down, queries across): so lse and delta are plain vectors, P^T and dS^T are row-major operands of dv
// and dk, and dq^T = k^T dS^T accumulates in a float buffer of the head. Five products of 2 D flops a score:
// multiply-adds bound it. attention_dropout_bwd:  the same for weights W = P mask / (1 - p), causal: dv = W^T dout, and
// W / P scales dout v^T.
#include "attention.h"

namespace igpt {
namespace IGPT_ISA {

template <class E>
struct BwdScratch {  // one thread's; n = query tiles, Ku = D / step, Tu = 64 / step
  using Unit = typename E::Unit;
  Scratch<Unit> qt, dot, qn, don;       // [n, Ku, 64] q and dout transposed   [n, Tu, Dp] the same along the tokens
  Scratch<Unit> k, v, kt, p, ds, ds_b;  // [64, Ku]   [64, Ku]   [Dp, Tu]   [64, Tu]   [64, Tu]   [Tu, 64]
  Scratch<float> dq, dk, dv, s, dp;     // [n, Dp, 64]   [64, Dp]   [64, Dp]   [64, 64]   [64, 64]
  Scratch<float> lse, delta;            // [n, 64]   [n, 64]
  Scratch<uint32_t> low, high;          // [n, 64]   [n, 64]: dropout's bits of the queries
  BwdScratch(int64_t n, int64_t D, int64_t Dp)
      : qt(scratch<Unit>(n * kTile * D / E::kStep)), dot(scratch<Unit>(n * kTile * D / E::kStep)),
        qn(scratch<Unit>(n * kTile * Dp / E::kStep)), don(scratch<Unit>(n * kTile * Dp / E::kStep)),
        k(scratch<Unit>(kTile * D / E::kStep)), v(scratch<Unit>(kTile * D / E::kStep)),
        kt(scratch<Unit>(Dp * kTile / E::kStep)), p(scratch<Unit>(kTile * kTile / E::kStep)),
        ds(scratch<Unit>(kTile * kTile / E::kStep)), ds_b(scratch<Unit>(kTile * kTile / E::kStep)),
        dq(scratch<float>(n * Dp * kTile)), dk(scratch<float>(kTile * Dp)), dv(scratch<float>(kTile * Dp)),
        s(scratch<float>(kTile * kTile)), dp(scratch<float>(kTile * kTile)), lse(scratch<float>(n * kTile)),
        delta(scratch<float>(n * kTile)), low(scratch<uint32_t>(n * kTile)), high(scratch<uint32_t>(n * kTile)) {}
};

// delta of a tile's 64 queries, summed in the very order in which the product dP sums: where a softmax has one term, O
// is V to the bit, dP - delta is then exactly zero, and so is dq.
template <class E>
static void row_sums(float* delta, const typename E::Unit* dot, const typename E::Unit* ot, int64_t Ku) {
  for (int64_t c = 0; c < kTile; c += kLanes) {
    vf total = {};
    for (int64_t k0 = 0; k0 < Ku; k0 += E::kChunk) {
      vf acc = {};
      for (int64_t k = k0; k < std::min(Ku, k0 + E::kChunk); ++k)
        acc = E::dot(acc, E::load_b(ot + k * kTile + c), E::load_b(dot + k * kTile + c));
      total += acc;
    }
    store(delta + c, total);
  }
}

// S^T, dP^T -> P^T and dS^T, for keys `key` and `key + 1` of the tile (a pair is what the B operand of dq^T stores).
template <class E>
static inline void gradient_rows(BwdScratch<E>& w, int64_t key, int64_t i, int64_t j, float scale, uint64_t bits0,
                                 uint64_t bits1, const Dropout& dropout) {
  const float *lse = w.lse.get() + i * kTile, *delta = w.delta.get() + i * kTile;
  const uint64_t bits[2] = {bits0, bits1};
  for (int64_t c = 0; c < kTile; c += kLanes) {
    vf ds[2] = {};
    if (((bits0 | bits1) >> c & ((1ull << kLanes) - 1)) == 0) {  // S and dP are not there
      for (int e = 0; e < 2; ++e)
        for (auto* out : {w.p.get(), w.ds.get()}) E::store_a(out + (key + e) * kTile / E::kStep, c, vf{});
      E::store_b_pair(w.ds_b.get(), key / 2, kTile, c, ds[0], ds[1]);
      continue;
    }
    for (int e = 0; e < 2; ++e) {
      const int64_t at = (key + e) * kTile + c;
      vf p = exp2((load(w.s.get() + at) * scale - load(lse + c)) *
                  kLog2e);  // the difference first: its error is what counts
      if (bits[e] != ~0ull) p = keep(uint32_t(bits[e] >> c), p, vf{});
      vf dp = load(w.dp.get() + at), kept = p;
      if (dropout) {
        vu low, high;
        std::memcpy(&low, w.low.get() + i * kTile + c, sizeof low);
        std::memcpy(&high, w.high.get() + i * kTile + c, sizeof high);
        const vf weights = dropout.weights(low, high, vu{} + uint32_t(j * kTile + key + e));
        dp *= weights, kept *= weights;
      }
      ds[e] = p * (dp - load(delta + c)) * scale;
      E::store_a(w.p.get() + (key + e) * kTile / E::kStep, c, kept);
      E::store_a(w.ds.get() + (key + e) * kTile / E::kStep, c, ds[e]);
    }
    E::store_b_pair(w.ds_b.get(), key / 2, kTile, c, ds[0], ds[1]);
  }
}

template <class E, class T>
static void head(BwdScratch<E>& w, int64_t bh, const View& dq, const View& dk, const View& dv, const View& dout,
                 const View& q, const View& k, const View& v, const View& o, const View& lse, const Tiles& tiles,
                 float scale, const Dropout& dropout) {
  using Unit = typename E::Unit;
  using Range = Extent::Range;
  const int64_t D = q.size[3], Dp = padded(D), Ku = D / E::kStep, Tu = kTile / E::kStep;
  const int32_t* order = tiles.order();
  const Head<const T> hq(q, bh, order), hk(k, bh, order), hv(v, bh, order), ho(o, bh, order), hdo(dout, bh, order);
  for (int64_t i = 0; i < tiles.nq; ++i) {
    pack_transposed<E>(w.qt.get() + i * kTile * Ku, hq, i * kTile, tiles.Tq, D);
    pack_transposed<E>(w.dot.get() + i * kTile * Ku, hdo, i * kTile, tiles.Tq, D);
    pack_tokens<E>(w.qn.get() + i * Tu * Dp, hq, i * kTile, tiles.Tq, D, Dp);
    pack_tokens<E>(w.don.get() + i * Tu * Dp, hdo, i * kTile, tiles.Tq, D, Dp);
    pack_transposed<E>(w.k.get(), ho, i * kTile, tiles.Tq, D);  // room that the keys take later
    row_sums<E>(w.delta.get() + i * kTile, w.dot.get() + i * kTile * Ku, w.k.get(), Ku);
  }
  for (int64_t t = 0; t < tiles.nq * kTile; ++t)
    w.lse[t] = t < tiles.Tq ? lse.as<float>()[bh * tiles.Tq + hq.slot(t)] : 0.f;
  for (int64_t t = 0; dropout && t < tiles.nq * kTile; ++t) {
    const uint64_t bits = dropout.query(bh, t);
    w.low[t] = uint32_t(bits), w.high[t] = uint32_t(bits >> 32);
  }
  std::fill_n(w.dq.get(), tiles.nq * Dp * kTile, 0.f);

  for (int64_t j = 0; j < tiles.nk; ++j) {
    pack_rows<E>(w.k.get(), hk, j * kTile, tiles.Tk, D);
    pack_rows<E>(w.v.get(), hv, j * kTile, tiles.Tk, D);
    // k^T as an A operand: row c holds column c, tokens along K. It is what pack_tokens makes, transposed.
    Unit* tokens = reinterpret_cast<Unit*>(w.dk.get());  // not in use yet
    pack_tokens<E>(tokens, hk, j * kTile, tiles.Tk, D, Dp);
    transpose_units(w.kt.get(), Tu, Tu, Dp,
                    [&](int64_t r, int64_t c) { return load(reinterpret_cast<float*>(tokens + r * Dp + c)); });
    std::fill_n(w.dk.get(), kTile * Dp, 0.f);
    std::fill_n(w.dv.get(), kTile * Dp, 0.f);
    for (int64_t n = 0; n < tiles.col_count(j); ++n) {
      const auto tile = tiles.col_tile(j, n);
      const int64_t i = tile.index;
      const bool full = tiles.full(i, j, tile.mask);
      const Extent& extent = tiles.extent(i, j, tile.mask);
      const Range all = extent.all_keys.to(2);
      const Unit *qt = w.qt.get() + i * kTile * Ku, *dot = w.dot.get() + i * kTile * Ku;
      Extent::each(extent.keys, {0, kTile}, [&](Range queries, Range seen) {
        const Range keys = seen.to(2);
        const int64_t r = keys.begin, c = queries.begin, at = r * kTile + c;
        gemm<E, false>(keys.size(), queries.size(), Ku, w.s.get() + at, kTile, w.k.get() + r * Ku, Ku, qt + c, kTile);
        gemm<E, false>(keys.size(), queries.size(), Ku, w.dp.get() + at, kTile, w.v.get() + r * Ku, Ku, dot + c, kTile);
      });
      for (int64_t r = all.begin; r < all.end; r += 2)
        gradient_rows<E>(w, r, i, j, scale, full ? ~0ull : tiles.col_bits(i, j, tile.mask, r),
                         full ? ~0ull : tiles.col_bits(i, j, tile.mask, r + 1), dropout);
      const Unit *qn = w.qn.get() + i * Tu * Dp, *don = w.don.get() + i * Tu * Dp;
      Extent::each(extent.queries, all, [&](Range keys, Range seeing) {
        const Range units = seeing.to(E::kStep);
        const int64_t r = keys.begin, u = units.begin / E::kStep, n_units = units.size() / E::kStep, at = r * Tu + u;
        gemm<E, true>(keys.size(), Dp, n_units, w.dv.get() + r * Dp, Dp, w.p.get() + at, Tu, don + u * Dp, Dp);
        gemm<E, true>(keys.size(), Dp, n_units, w.dk.get() + r * Dp, Dp, w.ds.get() + at, Tu, qn + u * Dp, Dp);
      });
      float* dq_i = w.dq.get() + i * Dp * kTile;
      Extent::each(extent.keys, {0, kTile}, [&](Range queries, Range seen) {
        const Range units = seen.to(E::kStep);
        const int64_t u = units.begin / E::kStep, n_units = units.size() / E::kStep, c = queries.begin;
        gemm<E, true>(Dp, queries.size(), n_units, dq_i + c, kTile, w.kt.get() + u, Tu, w.ds_b.get() + u * kTile + c,
                      kTile);
      });
    }
    const Head<T> hdk(dk, bh, order), hdv(dv, bh, order);
    for (int64_t r = 0; r < std::min<int64_t>(kTile, tiles.Tk - j * kTile); ++r) {
      store_row(hdk.row(j * kTile + r), w.dk.get() + r * Dp, dk.dtype, D);
      store_row(hdv.row(j * kTile + r), w.dv.get() + r * Dp, dv.dtype, D);
    }
  }

  const Head<T> hdq(dq, bh, order);
  for (int64_t i = 0; i < tiles.nq; ++i) {
    const float* dqt = w.dq.get() + i * Dp * kTile;
    float* rows = w.dk.get();  // not in use any more
    transpose_units(rows, Dp, Dp, kTile, [&](int64_t c, int64_t r) { return load(dqt + c * kTile + r); });
    for (int64_t r = 0; r < std::min<int64_t>(kTile, tiles.Tq - i * kTile); ++r)
      store_row(hdq.row(i * kTile + r), rows + r * Dp, dq.dtype, D);
  }
}

template <class E, class T>
static void backward(const View& dq, const View& dk, const View& dv, const View& dout, const View& q, const View& k,
                     const View& v, const View& o, const View& lse, const Tiles& tiles, float scale,
                     const Dropout& dropout) {
  const int64_t heads = q.size[0] * q.size[1], D = q.size[3];
  std::vector<BwdScratch<E>> workers;
  for (int64_t i = 0; i < std::min<int64_t>(heads, max_threads()); ++i) workers.emplace_back(tiles.nq, D, padded(D));
  parallel_for(heads, [&](int64_t bh, int thread) {
    head<E, T>(workers[size_t(thread)], bh, dq, dk, dv, dout, q, k, v, o, lse, tiles, scale, dropout);
  });
}

static void dispatch(const View& dq, const View& dk, const View& dv, const View& dout, const View& q, const View& k,
                     const View& v, const View& o, const View& lse, const BlockMaskView& mask, bool causal, float scale,
                     const Dropout& dropout) {
  check_attention(q, k, v);
  for (const View* x : {&dq, &dk, &dv, &dout, &o}) check_heads(*x, q, "every gradient");
  IGPT_CHECK(same_shape(dq, q) && same_shape(dk, k) && same_shape(dv, v) && same_shape(dout, q) && same_shape(o, q),
             "attention_bwd: gradients must be shaped like what they belong to");
  const Tiles tiles(q.size[2], k.size[2], causal, mask);
  if (q.dtype == DType::f32) return backward<F32Units, float>(dq, dk, dv, dout, q, k, v, o, lse, tiles, scale, dropout);
#if defined(__AVX512BF16__)
  backward<Bf16Units, bf16>(dq, dk, dv, dout, q, k, v, o, lse, tiles, scale, dropout);
#else
  backward<F32Units, bf16>(dq, dk, dv, dout, q, k, v, o, lse, tiles, scale, dropout);
#endif
}

static void attention_bwd(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse,
                          BlockMaskView mask, bool causal, float scale, Stream) {
  dispatch(dq, dk, dv, dout, q, k, v, o, lse, mask, causal, scale, Dropout());
}

static void attention_dropout_bwd(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse,
                                  float scale, float p, int64_t seed, Stream) {
  dispatch(dq, dk, dv, dout, q, k, v, o, lse, BlockMaskView(), true, scale, Dropout(p, seed));
}

void fill_attention_bwd(Ops& t) {
  t.attention_bwd = attention_bwd;
  t.attention_dropout_bwd = attention_dropout_bwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
