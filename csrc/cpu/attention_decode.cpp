// attention_decode:  o = softmax(scale q K^T) V for one query a head over the first `length` rows of a cache
//
// q, o [B, H, 1, D]   k, v [B, H, Tmax, D], any strides, f32 or bf16; no lengths, prefix or 8 bits.   Every byte of the
// cached keys and values is read once: they bound it. Under a mask those of the slots alone that row length - 1 of it
// sees, which pages may place anywhere; what sees nothing gives zeros. A task owns one head: scores into a row of
// floats, softmax, weighted sum of the values. No reduction crosses heads or images, so a batch gives the bits that its
// images give alone, and slots that are seen give the bits of a cache that has no others.
#include "attention_decode.h"

namespace igpt {
namespace IGPT_ISA {

template <class T>
static void decode(const View& o, const View& q, const View& k, const View& v, const Seen& seen, float scale) {
  const int64_t heads = q.size[0] * q.size[1], D = q.size[3], stride = padded(seen.count);
  auto scores = scratch<float>(std::min<int64_t>(heads, max_threads()) * stride);
  parallel_for(heads, [&](int64_t bh, int thread) {
    float query[128] = {}, row[128];
    load_row(query, Head<const T>(q, bh).row(0), q.dtype, D);
    decode_head<T>(row, query, Kept<T>(Head<const T>(k, bh)), Kept<T>(Head<const T>(v, bh)), D, seen, scale,
                   scores.get() + thread * stride);
    store_row(Head<T>(o, bh).row(0), row, o.dtype, D);
  });
}

static void attention_decode(View o, View partials, View q, View k, View v, View k_scale, View v_scale, View lengths,
                             View pages, BlockMaskView mask, int64_t length, int64_t prefix, float scale, Stream) {
  IGPT_CHECK(!partials && !k_scale && !v_scale && !lengths && prefix == 0,
             "attention_decode: the CPU's kernel serves neither lengths, prefixes nor caches of 8 bits");
  check_attention(q, k, v);
  check_heads(o, q, "o");
  IGPT_CHECK(q.size[2] == 1 && o.size[2] == 1, "attention_decode: one query a head");
  IGPT_CHECK(length >= 1, "attention_decode: length must be at least 1");
  IGPT_CHECK(mask || !pages, "attention_decode: a cache of pages needs a mask: without one all slots are seen");
  const Places places(pages, k.size[2], length);
  auto slots = scratch<int32_t>(mask ? length + kAhead : 0);
  const Seen seen = mask ? seen_in(mask, places, length, slots.get()) : Seen{length, nullptr};
  by_dtype([&](auto like) { decode<decltype(like)>(o, q, k, v, seen, scale); }, q.dtype);
}

void fill_attention_decode(Ops& t) {
  t.attention_decode = attention_decode;
}

}  // namespace IGPT_ISA
}  // namespace igpt
