// cache_append:  keys and values of new slots into a cache, as they are or as e4m3 with a scale for each page
//
// k, v [B, H, n, D] bf16 or f16   caches [B, H, T, D] of that dtype, or e4m3 with scales f32 [B, H, pages of 64 slots]
// lengths i32 [B]: the first slot, where images differ; slots outside the cache are left out
//
// scale = the least power of two with max |x| / scale <= 448 over a page: a float's relative precision is the same
// anywhere in its range, so a power of two costs nothing, and when a page's scale grows its elements are divided by a
// power of two, which is exact but at the range's lower end. Elements are rounded to nearest even. A page in which
// something is not finite gets NaN for a scale, which whoever reads it will see.
//
// A block owns one page of one head's keys or values: the maximum of what is new there, the page's elements anew if the
// scale has grown, then what is new. Bytes of a step: B * H * 2 rows, nothing; the launch bounds it.
#include "device.cuh"
#include "kv_cache.cuh"

namespace igpt {
namespace cuda {

using namespace decode;

constexpr int kAppendThreads = 128;
constexpr int kVector = 8;                                // elements of a thread at a time
constexpr float kSmallestScale = 8.673617379884035e-19f;  // 2^-60: products with it stay normal

// |x| <= 448, to nearest even.
__device__ inline uint32_t e4m3_of(float x) {
  const uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (size > 0x7f800000u) return 0x7fu;                                                           // NaN
  if (size < 0x3c800000u) return sign | uint32_t(__float2int_rn(__uint_as_float(size) * 512.f));  // below 2^-6
  return sign | (((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - 960u);  // exponents differ by 120
}
__device__ inline float float_of(uint32_t e4m3) {
  const uint32_t exponent = e4m3 >> 3 & 15u, mantissa = e4m3 & 7u;
  if ((e4m3 & 0x7fu) == 0x7fu) return NAN;
  const float size = exponent ? __uint_as_float((exponent + 120u) << 23 | mantissa << 20) : float(mantissa) / 512.f;
  return e4m3 & 0x80u ? -size : size;
}
// The scale that values up to `largest` ask for.
__device__ inline float scale_of(float largest) {
  const uint32_t bits = __float_as_uint(largest), exponent = bits >> 23;
  if (exponent == 255u) return NAN;
  if (exponent < 127u - 60u + 8u) return kSmallestScale;
  return __uint_as_float((exponent - 8u + ((bits & 0x7fffffu) > 0x600000u)) << 23);  // 448 = 1.75 * 2^8
}

// One of k and v.
template <class T, class E>
struct Side {
  E* cache;        // [B, H, T, D]
  float* scale;    // [B, H, pages]
  const T* fresh;  // [B, H, n, D]
  int64_t cache_batch, cache_head, cache_row, scale_batch, scale_head, fresh_batch, fresh_head, fresh_row;  // strides
  Side(const View& c, const View& s, const View& x)
      : cache(c.as<E>()), scale(s.as<float>()), fresh(x.as<T>()), cache_batch(c.stride[0]), cache_head(c.stride[1]),
        cache_row(c.stride[2]), scale_batch(s.stride[0]), scale_head(s.stride[1]), fresh_batch(x.stride[0]),
        fresh_head(x.stride[1]), fresh_row(x.stride[2]) {}
};

template <class T, class E>
__global__ void __launch_bounds__(kAppendThreads)
    cache_append_kernel(Side<T, E> keys, Side<T, E> values, const int* lengths, int slot, int heads, int count, int D,
                        int T_, int pages) {
  STATIC_SMEM(float, warps, kAppendThreads / 32);
  // Indices.
  const Side<T, E> side = blockIdx.y ? values : keys;
  const int b = int(blockIdx.x / pages) / heads, h = int(blockIdx.x / pages) % heads;
  const int start = lengths ? lengths[b] : slot;  // of what is new
  const int page = start / kTile + int(blockIdx.x % pages);
  const int begin = max(start, page * kTile), end = min(min(start + count, (page + 1) * kTile), T_);
  if (start < 0 || begin >= end) return;
  E* const cache = side.cache + b * side.cache_batch + h * side.cache_head;
  const T* const fresh = side.fresh + b * side.fresh_batch + h * side.fresh_head;
  const int vectors = D / kVector;
  // Calls f(row, column) for each vector of the rows first.. before last.
  const auto each = [&](int first, int last, auto f) {
    for (int i = threadIdx.x; i < (last - first) * vectors; i += kAppendThreads)
      f(first + i / vectors, i % vectors * kVector);
  };
  const auto is_new = [&](int t, int c) { return load_as<T, kVector>(fresh, (t - start) * side.fresh_row + c); };

  if constexpr (sizeof(E) == 2) {
    each(begin, end, [&](int t, int c) { store_as<T, kVector>(cache, t * side.cache_row + c, is_new(t, c)); });
  } else {
    // The scale.
    float largest = 0.f;
    each(begin, end, [&](int t, int c) {
      const Floats<kVector> x = is_new(t, c);
#pragma unroll
      for (int i = 0; i < kVector; ++i)  // NaN counts as the largest
        largest = __uint_as_float(max(__float_as_uint(largest), __float_as_uint(fabsf(x.v[i]))));
    });
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2)
      largest =
          __uint_as_float(max(__float_as_uint(largest), __float_as_uint(__shfl_xor_sync(0xffffffffu, largest, lanes))));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
    float* const scale = side.scale + b * side.scale_batch + h * side.scale_head + page;
    const float old = begin > page * kTile ? *scale : 0.f;
    __syncthreads();  // also: all have read the old scale
    for (int w = 0; w < kAppendThreads / 32; ++w)
      largest = __uint_as_float(max(__float_as_uint(largest), __float_as_uint(warps[w])));
    const float wanted = scale_of(largest);
    const float now = wanted != wanted || old != old ? NAN : fmaxf(wanted, old);
    if (threadIdx.x == 0) *scale = now;

    // What the page holds, and what is new.
    const auto store = [&](int t, int c, const float (&x)[kVector]) {
      uint32_t words[2] = {};
#pragma unroll
      for (int i = 0; i < kVector; ++i) words[i / 4] |= e4m3_of(x[i]) << i % 4 * 8;
      *reinterpret_cast<uint2*>(cache + t * side.cache_row + c) = make_uint2(words[0], words[1]);
    };
    if (now != old)
      each(page * kTile, begin, [&](int t, int c) {
        const uint2 held = *reinterpret_cast<const uint2*>(cache + t * side.cache_row + c);
        float x[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = float_of((i < 4 ? held.x : held.y) >> i % 4 * 8 & 0xffu) * (old / now);
        store(t, c, x);
      });
    each(begin, end, [&](int t, int c) {
      const Floats<kVector> fresh = is_new(t, c);
      float x[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] = fresh.v[i] / now;
      store(t, c, x);
    });
  }
}

static void cache_append(View k_cache, View v_cache, View k_scale, View v_scale, View k, View v, View lengths,
                         int64_t slot, Stream stream) {
  constexpr const char* kOp = "cache_append";
  check_cache(k_cache, v_cache, k_scale, v_scale, k, kOp);
  check_side(k, k, "k", kOp), check_side(v, k, "v", kOp), check_lengths(lengths, k.size[0], kOp);
  IGPT_CHECK(k.size[0] == k_cache.size[0], "cache_append: k and its cache differ in batch");
  IGPT_CHECK(slot >= 0 && k.size[2] <= INT32_MAX / 4 && slot <= INT32_MAX / 4, "cache_append: slots out of range");
  IGPT_CHECK(lengths || slot + k.size[2] <= k_cache.size[2], "cache_append: slots %lld to %lld of a cache of %lld",
             (long long)(slot), (long long)(slot + k.size[2]), (long long)(k_cache.size[2]));
  if (k.numel() == 0) return;
  // Where the device knows the first slot, it may lie anywhere in its page.
  const int64_t pages =
      lengths ? (k.size[2] + kTile - 2) / kTile + 1 : (slot + k.size[2] - 1) / kTile - slot / kTile + 1;
  IGPT_CHECK(k.size[0] * k.size[1] * pages <= INT32_MAX, "cache_append: too many heads for one launch");
  const OnDevice device(k);
  const auto run = [&]<class T, class E>() {
    LAUNCH((cache_append_kernel<T, E>), dim3(unsigned(k.size[0] * k.size[1] * pages), 2), kAppendThreads, 0, stream,
           Side<T, E>(k_cache, k_scale, k), Side<T, E>(v_cache, v_scale, v), lengths.as<int>(), int(slot),
           int(k.size[1]), int(k.size[2]), int(k.size[3]), int(k_cache.size[2]), int(pages));
  };
  const auto by_bytes = [&]<class T>() {
    k_cache.dtype == DType::e4m3 ? run.template operator()<T, E4m3>() : run.template operator()<T, T>();
  };
  k.dtype == DType::bf16 ? by_bytes.template operator()<__nv_bfloat16>() : by_bytes.template operator()<__half>();
}

void fill_cache_append(Ops& t) {
  t.cache_append = cache_append;
}

}  // namespace cuda
}  // namespace igpt
