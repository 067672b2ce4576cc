// decode_step: one pixel more of every image through all layers, with a cache of keys and values
//
//   h = wte[pixel] + wpe[slot];  per layer:  q, k, v = qkv(norm(h)) ; k, v into the cache's slot
//   h += attn_proj(softmax(q K^T / sqrt(D)) V);  h += mlp_proj(gelu(fc(norm(h))));  last:  logits = norm(h) wtet^T
//
// Bound by bytes: every weight and every cached key and value that a head's mask shows is read once. So the step is one
// parallel region, in which memory never waits for an interpreter or for a team of threads to form. A thread keeps its
// own copy of the residual stream, in float, and all threads do the small norms alike instead of waiting for one; the
// linears share their weight rows out, attention its heads. A task computes what it owns in an order of its own, and
// rows know nothing of each other: neither threads nor neighbours change a bit.
#include "activation.h"
#include "attention_decode.h"
#include "linear.h"

namespace igpt {
namespace IGPT_ISA {

struct Sizes {
  int64_t B, d, heads, D, inner, T, V, slot, place;  // T: of the cache, where the slot has its place
  int64_t prefix, sharers;                           // slots that stand before the cache, and of how many images
};

static void check_weight(const View& w, int64_t rows, int64_t cols, DType dtype, const char* name) {
  IGPT_CHECK(w && w.dtype == dtype && w.dense() && w.rows() == rows && w.cols() == cols,
             "decode_step: %s must be dense, [%lld, %lld] and of the cache's dtype", name, (long long)(rows),
             (long long)(cols));
}
static void check_bias(const View& b, int64_t cols, DType dtype, const char* name) {
  if (b) check_weight(b, 1, cols, dtype, name);
}

// What each mask shows of the cache in this step: listed once, for all heads that look through it.
class Sights {
 public:
  Sights(const MasksView& masks, const Places& places, int64_t layers, int64_t length)
      : masks_(masks), all_{length, nullptr} {
    bool everywhere = masks.groups > 0;
    for (int64_t i = 0; i < masks.layers * masks.groups; ++i) everywhere = everywhere && masks.of[i] >= 0;
    IGPT_CHECK(everywhere || !places,
               "decode_step: a cache of pages needs masks of all heads: without one all slots are seen");
    if (!masks.groups) return;
    IGPT_CHECK(masks.layers == layers, "decode_step: masks for %lld layers were given to %lld",
               (long long)(masks.layers), (long long)(layers));
    for (int64_t i = 0; i < layers * masks.groups; ++i)
      IGPT_CHECK(masks.of[i] < masks.count, "decode_step: there is no mask %d", masks.of[i]);
    slots_ = scratch<int32_t>(masks.count * (length + kAhead)), seen_ = scratch<Seen>(masks.count);
    for (int64_t m = 0; m < masks.count; ++m)
      seen_[size_t(m)] = seen_in(masks.mask[m], places, length, slots_.get() + m * (length + kAhead));
  }
  const Seen& of(int64_t layer, int64_t head) const {
    const int32_t m = masks_.groups ? masks_.of[layer * masks_.groups + head % masks_.groups] : -1;
    return m < 0 ? all_ : seen_[size_t(m)];
  }

 private:
  const MasksView& masks_;
  const Seen all_;
  Scratch<int32_t> slots_;
  Scratch<Seen> seen_;
};

static Sizes check_step(const View& logits, const View& cache, const View& prefix, const View& pixels, const View& wte,
                        const View& wpe, const LayersView& layers, const View& ln_f, const View& wtet,
                        const View& pages, int64_t slot) {
  const DType t = cache.dtype;
  IGPT_CHECK(is_float(t), "decode_step: float32 or bfloat16 only");
  IGPT_CHECK(cache.ndim == 4 && cache.dense() && cache.size[0] == layers.count && layers.count > 0,
             "decode_step: the cache must be dense, [layers, B * 2 * H, T, D]");
  Sizes s;
  s.B = pixels.numel(), s.T = cache.size[2], s.D = cache.size[3], s.d = wte.cols(), s.V = wtet.rows(), s.slot = slot;
  s.inner = layers.layer[0].fc.rows(), s.heads = s.D ? s.d / s.D : 0;
  IGPT_CHECK(s.heads > 0 && s.D % 8 == 0 && s.D <= 128 && s.heads * s.D == s.d && cache.size[1] == s.B * 2 * s.heads,
             "decode_step: the cache does not fit %lld images of width %lld", (long long)(s.B), (long long)(s.d));
  s.prefix = 0, s.sharers = 1;
  if (prefix) {
    IGPT_CHECK(
        prefix.ndim == 4 && prefix.dense() && prefix.dtype == t && prefix.size[0] == layers.count &&
            prefix.size[1] > 0 && prefix.size[1] % (2 * s.heads) == 0 && prefix.size[3] == s.D && !pages,
        "decode_step: the prefix must be dense, [layers, M * 2 * H, P, D] and of the cache's dtype, without pages");
    s.prefix = prefix.size[2], s.sharers = cache.size[1] / prefix.size[1];
    IGPT_CHECK(prefix.size[1] * s.sharers == cache.size[1] && s.prefix <= slot,
               "decode_step: the prefix must be that of so many images that they divide %lld, and end before the slot",
               (long long)(s.B));
  }
  const int64_t positions = pages ? wpe.rows() : s.prefix + s.T;
  IGPT_CHECK(slot >= 0 && slot < positions, "decode_step: slot must be in 0..%lld", (long long)(positions - 1));
  IGPT_CHECK(pixels.dtype == DType::i64 && pixels.dense(), "decode_step: pixels must be dense int64");
  for (int64_t b = 0; b < s.B; ++b)
    IGPT_CHECK(pixels.as<int64_t>()[b] >= 0 && pixels.as<int64_t>()[b] < wte.rows(),
               "decode_step: pixel %lld is outside the palette", (long long)(pixels.as<int64_t>()[b]));
  check_weight(wte, wte.rows(), s.d, t, "wte"), check_weight(wpe, positions, s.d, t, "wpe");
  check_weight(ln_f, 1, s.d, t, "ln_f"), check_weight(wtet, s.V, s.d, t, "wtet");
  if (s.B) check_weight(logits, s.B, s.V, t, "logits");
  for (int64_t l = 0; l < layers.count; ++l) {
    const LayerView& w = layers.layer[l];
    check_weight(w.ln_1, 1, s.d, t, "ln_1"), check_weight(w.ln_2, 1, s.d, t, "ln_2");
    check_weight(w.qkv, 3 * s.d, s.d, t, "qkv"), check_bias(w.qkv_bias, 3 * s.d, t, "qkv's bias");
    check_weight(w.attn_proj, s.d, s.d, t, "attn_proj"), check_bias(w.attn_proj_bias, s.d, t, "attn_proj's bias");
    check_weight(w.fc, s.inner, s.d, t, "fc"), check_bias(w.fc_bias, s.inner, t, "fc's bias");
    check_weight(w.mlp_proj, s.d, s.inner, t, "mlp_proj"), check_bias(w.mlp_proj_bias, s.d, t, "mlp_proj's bias");
  }
  return s;
}

// All of a step's buffers. X: what a linear reads, with zeros behind its columns.
template <class E>
struct Buffers {
  using X = typename E::X;
  const int64_t dx, inner_x, wide;       // columns of x and z as linears read them; of a stream's row
  Scratch<float> qkv, delta, h, scores;  // [B, 3 d], [B, d], [threads, B, wide], [threads, slots]
  Scratch<X> x, mixed, z;                // [threads, B, dx], [B, dx], [B, inner_x]
  const int64_t room;                    // for x, mixed or z as multiply() wants them
  Scratch<uint32_t> prepared;            // [threads, room]

  Buffers(const Sizes& s, int threads)
      : dx(padded_for<E>(s.d)), inner_x(padded_for<E>(s.inner)), wide(padded(s.d)),
        room(std::max(room_for<E>(s.B, s.d), room_for<E>(s.B, s.inner))), prepared(scratch<uint32_t>(threads * room)) {
    // Of what each thread has, none of it is cleared here: that would be the longest part of a step on many cores.
    qkv = scratch<float>(s.B * 3 * s.d), delta = scratch<float>(s.B * s.d);
    h = scratch<float>(threads * s.B * wide), scores = scratch<float>(threads * padded(s.slot + 1));
    x = scratch<X>(threads * s.B * dx), mixed = zeros<X>(s.B * dx), z = zeros<X>(s.B * inner_x);
  }
};

// h += delta (when there is one);  x = h rstd weight.   All threads do it alike, each for itself.
template <class X, class T>
static void add_and_norm(X* x, int64_t dx, float* h, int64_t wide, const float* delta, const T* weight, int64_t B,
                         int64_t d, float eps) {
  for (int64_t b = 0; b < B; ++b, x += dx, h += wide) {
    vf squares = {};
    for (int64_t c = 0; c < d; c += kLanes) {
      vf s = load(h + c);
      if (delta) s += load_upto(delta + b * d + c, std::min<int64_t>(kLanes, d - c));
      store(h + c, s);
      squares += s * s;
    }
    const vf rstd = splat(1.f / std::sqrt(sum(squares) / float(d) + eps));
    for (int64_t c = 0; c < d; c += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, d - c);
      store_upto(x + c, load(h + c) * rstd * load_upto(weight + c, n), n);
    }
  }
}

// y = f(x weight^T + bias): its rows are shared out among the threads, which all have to come here and leave together.
// Four tasks at a time: rows that a task asks for ahead of it are then its thread's own.
template <class E, class T, class Y, class F>
static void share_linear(Y* y, int64_t ldy, const typename E::X* x, uint32_t* room, int64_t Kp, int64_t B,
                         const View& weight, const View& bias, F&& f) {
  const int64_t M = weight.size[0], K = weight.size[1];
  prepare<E>(room, x, B, K);
  const T* offset = bias.as<T>();
#pragma omp for schedule(dynamic, 4)
  for (int64_t m0 = 0; m0 < M; m0 += kOutputs) {
    const int64_t end = std::min(m0 + kOutputs, M);
    multiply<E>(x, room, B, Kp, weight.as<T>(), K, m0, end, [&](int64_t n, const float* out) {
      for (int64_t m = m0; m < end; m += kLanes) {
        const int64_t left = std::min<int64_t>(kLanes, end - m);
        const vf sum = load(out + m - m0);
        store_upto(y + n * ldy + m, f(offset ? sum + load_upto(offset + m, left) : sum), left);
      }
    });
  }
}

// The heads' new keys and values go into the cache, then their queries look at what they see of it. Images that share a
// prefix follow one another within a head: of theirs one reads it from memory, the others from a cache.
template <class E, class T>
static void share_attention(Buffers<E>& buffers, T* cache, const T* prefix, const Sizes& s, const Sights& sights,
                            int64_t layer, float* score) {
  const float scale = 1.f / std::sqrt(float(s.D));
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < s.B * s.heads; ++task) {
    const int64_t group = task / (s.heads * s.sharers), head = task / s.sharers % s.heads;
    const int64_t b = group * s.sharers + task % s.sharers;
    const float* qkv = buffers.qkv.get() + b * 3 * s.d + head * s.D;
    T* keys = cache + (b * 2 * s.heads + head) * s.T * s.D;
    T* values = keys + s.heads * s.T * s.D;
    const auto kept = [&](const T* own, int64_t kind) {
      const T* shared = prefix + ((group * 2 + kind) * s.heads + head) * s.prefix * s.D;
      return Kept<T>(Head<const T>(own, s.D), Head<const T>(shared, s.D), s.prefix);
    };
    float query[128] = {}, row[128];
    std::memcpy(query, qkv, size_t(s.D) * sizeof(float));
    for (int64_t c = 0; c < s.D; c += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, s.D - c);
      store_upto(keys + s.place * s.D + c, load_upto(qkv + s.d + c, n), n);
      store_upto(values + s.place * s.D + c, load_upto(qkv + 2 * s.d + c, n), n);
    }
    decode_head<T>(row, query, kept(keys, 0), kept(values, 1), s.D, sights.of(layer, head), scale, score);
    for (int64_t c = 0; c < s.D; c += kLanes)
      store_upto(buffers.mixed.get() + b * buffers.dx + head * s.D + c, load(row + c),
                 std::min<int64_t>(kLanes, s.D - c));
  }
}

template <class E, class T>
static void run_step(const View& logits, const View& cache, const View& prefix, const View& pixels, const View& wte,
                     const View& wpe, const LayersView& layers, const View& ln_f, const View& wtet,
                     const Sights& sights, const Sizes& s, float eps) {
  const int threads = max_threads();
  Buffers<E> buffers(s, threads);
  float *const qkv = buffers.qkv.get(), *const delta = buffers.delta.get();
  typename E::X *const mixed = buffers.mixed.get(), *const z = buffers.z.get();
  const int64_t dx = buffers.dx, inner_x = buffers.inner_x, wide = buffers.wide, per_layer = cache.stride[0];
  const auto as_it_is = [](vf v) { return v; };
  const auto gelu = [](vf v) { return quick_gelu(v); };
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    float *const h = buffers.h.get() + thread * s.B * wide, *const score =
                                                                buffers.scores.get() + thread * padded(s.slot + 1);
    typename E::X* const x = buffers.x.get() + thread * s.B * dx;
    uint32_t* const room = buffers.prepared.get() + thread * buffers.room;
    const MatrixUnit used;
    for (int64_t b = 0; b < s.B; ++b) {
      std::fill(x + b * dx + s.d, x + (b + 1) * dx, typename E::X{});
      for (int64_t c = 0; c < s.d; c += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, s.d - c), pixel = pixels.as<int64_t>()[b];
        store(h + b * wide + c,
              load_upto(wte.as<T>() + pixel * s.d + c, n) + load_upto(wpe.as<T>() + s.slot * s.d + c, n));
      }
    }
    // A linear's end is where the threads meet: what it wrote may be read behind it, what it read may be written.
    for (int64_t l = 0; l < layers.count; ++l) {
      const LayerView& w = layers.layer[l];
      add_and_norm(x, dx, h, wide, l ? delta : nullptr, w.ln_1.as<T>(), s.B, s.d, eps);
      share_linear<E, T>(qkv, 3 * s.d, x, room, dx, s.B, w.qkv, w.qkv_bias, as_it_is);
      const T* before = prefix ? prefix.as<T>() + l * prefix.stride[0] : cache.as<T>();
      share_attention<E, T>(buffers, cache.as<T>() + l * per_layer, before, s, sights, l, score);
      share_linear<E, T>(delta, s.d, mixed, room, dx, s.B, w.attn_proj, w.attn_proj_bias, as_it_is);
      add_and_norm(x, dx, h, wide, delta, w.ln_2.as<T>(), s.B, s.d, eps);
      share_linear<E, T>(z, inner_x, x, room, dx, s.B, w.fc, w.fc_bias, gelu);
      share_linear<E, T>(delta, s.d, z, room, inner_x, s.B, w.mlp_proj, w.mlp_proj_bias, as_it_is);
    }
    add_and_norm(x, dx, h, wide, delta, ln_f.as<T>(), s.B, s.d, eps);
    share_linear<E, T>(logits.as<T>(), s.V, x, room, dx, s.B, wtet, View{}, as_it_is);
  }
}

static void decode_step(View logits, View cache, View prefix, View pixels, View wte, View wpe, LayersView layers,
                        View ln_f, View wtet, View pages, MasksView masks, int64_t slot, float eps, Stream) {
  Sizes s = check_step(logits, cache, prefix, pixels, wte, wpe, layers, ln_f, wtet, pages, slot);
  const Places places(pages, s.prefix + s.T, slot + 1);
  const Sights sights(masks, places, layers.count, slot + 1);
  s.place = places(slot) - s.prefix;
  if (s.B == 0) return;
  if (cache.dtype == DType::f32)
    return run_step<Wide<float>, float>(logits, cache, prefix, pixels, wte, wpe, layers, ln_f, wtet, sights, s, eps);
  run_step<HalfRows, bf16>(logits, cache, prefix, pixels, wte, wpe, layers, ln_f, wtet, sights, s, eps);
}

void fill_decode_step(Ops& t) {
  t.decode_step = decode_step;
}

}  // namespace IGPT_ISA
}  // namespace igpt
