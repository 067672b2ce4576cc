// attention_fwd:  o = softmax(scale q k^T) v    lse = log sum exp(scale q k^T)    over [B, H, T, D] views, tile by tile
//
// q, k, v, o f32 or bf16 (any strides, D contiguous, D a multiple of 8 up to 128)   lse [B, H, Tq] f32.
// k and v of a few heads are packed once; a task then owns 64 queries of one head and walks over its key tiles with the
// online softmax: S = Q K^T, running maximum m and sum l, O = O exp(m_old - m) + P V. Bound by multiply-adds: 4 D
// flops a score against about 20 vector instructions a vector of scores; with AMX, which at D = 64 multiplies a tile in
// 1,000 cycles, by those instructions and by the caches. A query that sees no key gives o = 0 and lse = -1e30.
//
// attention_dropout_fwd:  the same, causal, o from weights some of which are dropped and the others scaled; about ten
// instructions a vector more.
#include "attention.h"

namespace igpt {
namespace IGPT_ISA {

template <class E>
struct FwdScratch {  // one thread's tiles
  using Unit = typename E::Unit;
  Scratch<Unit> q;              // [64, D / step]
  Scratch<float> s, o, m, l;    // [64, 64], its rows' beginnings taken over by P   [64, Dp]   [64]   [64]
  Scratch<uint32_t> low, high;  // [64]   [64]: dropout's bits of the queries
  FwdScratch(int64_t D, int64_t Dp)
      : q(scratch<Unit>(kTile * D / E::kStep)), s(scratch<float>(kTile * kTile)), o(scratch<float>(kTile * Dp)),
        m(scratch<float>(kTile)), l(scratch<float>(kTile)), low(scratch<uint32_t>(kTile)),
        high(scratch<uint32_t>(kTile)) {}
  Unit* p(int64_t query) { return reinterpret_cast<Unit*>(s.get() + query * kTile); }  // rows kTile units apart
};

constexpr int kVectors = kTile / kLanes;  // vectors in a row of a tile
constexpr float kRise = 8.f;              // a maximum follows scores only if they are this far above, in E's base

// Turns kLanes rows of S from r on into P, and brings m, l and the rows of O up to date. Rows go together, so that what
// is one number a row is a lane, and nothing waits for the sum along a row. Vectors without a bit are not read.
template <bool kFull, class E>
static inline void softmax(FwdScratch<E>& w, int64_t r, int64_t Dp, float scale, const uint64_t* bits,
                           const Dropout& dropout, int64_t first_key) {
  const auto seen = [&](int i, int n) {
    return kFull ? ~0u : uint32_t(bits[i] >> (n * kLanes)) & uint32_t((1ull << kLanes) - 1);
  };
  const auto scores = [&](int i, int n) {
    const vf s = load(w.s.get() + (r + i) * kTile + n * kLanes) * (scale * E::kBase);
    return kFull ? s : keep(seen(i, n), s, splat(-INFINITY));
  };
  vf tops[kLanes], totals[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    vf top = splat(-INFINITY);
    for (int n = 0; n < kVectors; ++n)
      if (seen(i, n)) top = max(top, scores(i, n));
    tops[i] = top;
  }
  const vf here = maxes(tops), before = load(w.m.get() + r), m = here > before + kRise ? here : before;
  store(w.m.get() + r, m);
  for (int i = 0; i < kLanes; ++i) {
    auto* p = w.p(r + i);  // written behind what is read
    vf total = {};
    const auto weights = [&](int n) {
      if (!seen(i, n)) return vf{};
      const vf v = E::exp(scores(i, n) - w.m[r + i]);  // of a single key exactly 1
      total += v;
      if (!dropout) return v;
      return v * dropout.weights(vu{} + w.low[r + i], vu{} + w.high[r + i], counted(uint32_t(first_key + n * kLanes)));
    };
    for (int n = 0; n < kVectors; n += 2) {
      const vf first = weights(n), second = weights(n + 1);
      E::store_a(p, n * kLanes, first, second);
    }
    totals[i] = total;
  }
  const vf fade = E::exp(before - m);  // 1 where nothing rose
  store(w.l.get() + r, load(w.l.get() + r) * fade + sums(totals));
  for (int i = 0; i < kLanes; ++i) {
    if (m[i] == before[i]) continue;
    float* o = w.o.get() + (r + i) * Dp;
    for (int64_t c = 0; c < Dp; c += kLanes) store(o + c, load(o + c) * fade[i]);
  }
}

template <class E, class T>
static void query_tile(FwdScratch<E>& w, const View& out, const View& lse, const View& q, const typename E::Unit* kt,
                       const typename E::Unit* vp, const Tiles& tiles, int64_t bh, int64_t i, float scale, bool add,
                       const Dropout& dropout) {
  using Unit = typename E::Unit;
  using Range = Extent::Range;
  const int64_t D = q.size[3], Dp = padded(D), Ku = D / E::kStep, Tu = kTile / E::kStep, t = i * kTile;
  const int64_t rows = std::min<int64_t>(kTile, tiles.Tq - t);
  if (add && tiles.row_count(i) == 0) return;
  const MatrixUnit used;
  pack_rows<E>(w.q.get(), Head<const T>(q, bh, tiles.order()), t, tiles.Tq, D);
  if (dropout) dropout.queries(w.low.get(), w.high.get(), bh, t, kTile);
  std::fill_n(w.m.get(), kTile, kEmptyLse);
  std::fill_n(w.l.get(), kTile, 0.f);
  std::fill_n(w.o.get(), kTile * Dp, 0.f);
  const Head<T> o(out, bh, tiles.order());
  float* const lse_bh = lse.as<float>() + bh * tiles.Tq;
  // What other parts have found is where this one goes on: their keys weigh exp(lse) together, or 1 beside m = lse.
  for (int64_t r = 0; add && r < rows; ++r) {
    o.ask(t + r + kRowsAhead, t + rows, D);
    const float known = lse_bh[o.slot(t + r)];
    if (known == kEmptyLse) continue;
    w.m[r] = known * E::kBase, w.l[r] = 1.f;
    load_row(w.o.get() + r * Dp, o.row(t + r), out.dtype, D);
  }
  for (int64_t n = 0; n < tiles.row_count(i); ++n) {
    const auto tile = tiles.row_tile(i, n);
    const int64_t j = tile.index;
    const bool full = tiles.full(i, j, tile.mask);
    const Extent& extent = tiles.extent(i, j, tile.mask);
    const Unit *kj = kt + j * Ku * kTile, *vj = vp + j * Tu * Dp;
    Extent::each(extent.queries, {0, kTile}, [&](Range keys, Range seeing) {
      const Range queries = seeing.within({0, rows}).to(E::kRows);
      const int64_t r = queries.begin, c = keys.begin;
      gemm<E, false>(queries.size(), keys.size(), Ku, w.s.get() + r * kTile + c, kTile, w.q.get() + r * Ku, Ku, kj + c,
                     kTile);
    });
    const Range seeing = extent.all_queries.within({0, rows});
    for (int64_t r = seeing.begin / kLanes * kLanes; r < seeing.end; r += kLanes) {
      if (full && r + kLanes <= rows) {
        softmax<true>(w, r, Dp, scale, nullptr, dropout, j * kTile);
        continue;
      }
      uint64_t bits[kLanes];
      for (int e = 0; e < kLanes; ++e) bits[e] = r + e < seeing.end ? tiles.row_bits(i, j, tile.mask, r + e) : 0;
      softmax<false>(w, r, Dp, scale, bits, dropout, j * kTile);
    }
    Extent::each(extent.keys, seeing.to(E::kRows), [&](Range queries, Range seen) {
      const Range units = seen.to(E::kDepth);
      const int64_t r = queries.begin, u = units.begin / E::kStep;
      gemm<E, true>(queries.size(), Dp, units.size() / E::kStep, w.o.get() + r * Dp, Dp, w.p(r) + u, kTile, vj + u * Dp,
                    Dp);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    o.ask(t + r + kRowsAhead, t + rows, D);
    const float l = w.l[r], factor = l == 0.f ? 0.f : 1.f / l;
    T* to = o.row(t + r);
    const float* row = w.o.get() + r * Dp;
    for (int64_t c = 0; c < D; c += kLanes)
      store_upto(to + c, load(row + c) * factor, std::min<int64_t>(kLanes, D - c));
    lse_bh[o.slot(t + r)] = l == 0.f ? kEmptyLse : w.m[r] / E::kBase + std::log(l);
  }
}

template <class E, class T>
static void forward(const View& o, const View& lse, const View& q, const View& k, const View& v,
                    const std::vector<Tiles>& parts, float scale, const Dropout& dropout) {
  using Unit = typename E::Unit;
  const int64_t D = q.size[3], Dp = padded(D), heads = q.size[0] * q.size[1], threads = max_threads();
  const int64_t nq = parts[0].nq, nk = parts[0].nk;
  const int64_t k_size = nk * kTile * (D / E::kStep), v_size = nk * (kTile / E::kStep) * Dp;
  const int64_t wave = std::min(heads, threads);  // heads packed at a time: memory stays bounded
  auto kt = scratch<Unit>(wave * k_size);
  auto vp = scratch<Unit>(wave * v_size);
  std::vector<FwdScratch<E>> workers;
  for (int64_t i = 0; i < threads; ++i) workers.emplace_back(D, Dp);
  for (int64_t first = 0; first < heads; first += wave) {
    const int64_t count = std::min(wave, heads - first);
    for (const Tiles& tiles : parts) {
      parallel_for(count * nk, [&](int64_t n, int) {
        const int64_t h = n / nk, j = n % nk;
        const Head<const T> hk(k, first + h, tiles.order()), hv(v, first + h, tiles.order());
        pack_transposed<E>(kt.get() + h * k_size + j * kTile * (D / E::kStep), hk, j * kTile, tiles.Tk, D);
        pack_tokens<E>(vp.get() + h * v_size + j * (kTile / E::kStep) * Dp, hv, j * kTile, tiles.Tk, D, Dp);
      });
      parallel_for(count * nq, [&](int64_t n, int thread) {
        const int64_t h = n / nq, i = nq - 1 - n % nq;  // the longest rows of a head first
        query_tile<E, T>(workers[size_t(thread)], o, lse, q, kt.get() + h * k_size, vp.get() + h * v_size, tiles,
                         first + h, i, scale, &tiles != &parts[0], dropout);
      });
    }
  }
}

static void dispatch(const View& o, const View& lse, const View& q, const View& k, const View& v, const MaskParts& mask,
                     bool causal, float scale, const Dropout& dropout) {
  check_attention(q, k, v);
  check_heads(o, q, "o");
  IGPT_CHECK(o.size[2] == q.size[2] && lse.dtype == DType::f32 && lse.dense() && lse.numel() == q.numel() / q.size[3],
             "attention: o must be shaped like q and lse float32 [B, H, Tq]");
  const auto parts = tiles_of(q, k, causal, mask);
  if (q.dtype == DType::f32) return forward<F32Units, float>(o, lse, q, k, v, parts, scale, dropout);
  forward<HalfUnits, bf16>(o, lse, q, k, v, parts, scale, dropout);
}

static void attention_fwd(View o, View lse, View q, View k, View v, MaskParts mask, bool causal, float scale, Stream) {
  dispatch(o, lse, q, k, v, mask, causal, scale, Dropout());
}

static void attention_dropout_fwd(View o, View lse, View q, View k, View v, float scale, float p, int64_t seed,
                                  Stream) {
  dispatch(o, lse, q, k, v, MaskParts(), true, scale, Dropout(p, seed));
}

void fill_attention_fwd(Ops& t) {
  t.attention_fwd = attention_fwd;
  t.attention_dropout_fwd = attention_dropout_fwd;
}

}  // namespace IGPT_ISA
}  // namespace igpt
