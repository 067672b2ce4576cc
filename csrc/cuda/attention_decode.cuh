// What one decoding query, or eight that share their keys, does with a cache: the part of a warp.
//
//   s = scale q k^T    p = exp(s - max s)    o = p v    over chunks of kDecodeChunk slots, each from scratch
//
// A warp owns a chunk and walks over it in steps of 16 to 64 slots, 3 or 4 KB of keys and as much of values, which go
// from memory straight into the fragments of mma m16n8k16: keys are its rows, so that 16 of them meet up to eight
// queries at once (one query stands in all eight columns). Which element of a head stands at which place of a sum is
// free, if query and key agree: lane l = 4 g + c reads pieces c of keys g and g + 8 with 16 bytes at a time. For
// o^T = v^T p^T it reads piece g of four keys, whose elements two bytes each pair up by themselves. So there is no
// shared memory, no barrier, no copy and no conversion of 16 bits; bytes of e4m3 become f16 by shifts.
//
// Instructions of a warp for 512 bytes of keys and values at D = 64: 1 load, 1 mma, and of all kinds about 25 (sm_90a),
// where an H200 has 120 slots at the speed of its memory; of e4m3 about 55, most of them shifts. Bytes on their way: a
// warp has 6 or 8 KB, the next keys being asked for as soon as the scores are made and the next values after their
// sums.
//
// A chunk's maximum, sum and o depend on the query and the chunk alone, and are added up in the chunks' order with one
// text (Total), whether by the block itself or, of a sequence split over blocks, by a kernel: no bit depends on the
// batch, on neighbours or on a split.
#pragma once
#include "kv_cache.cuh"

namespace igpt {
namespace cuda {
namespace decode {

// ---- a warp's part ----

template <int D, class E, int kQueries>
struct Worker {
  static_assert(kQueries == 1 || kQueries == 8);
  static constexpr bool kBytes = sizeof(E) == 1;
  static constexpr int kRow = D * int(sizeof(E));
  static constexpr int kStep = kRow <= 64 ? 64 : kRow <= 128 ? 32 : 16;  // slots at a time: 3 or 4 KB of keys
  static constexpr int kStepsOfTile = kTile / kStep, kSteps = kDecodeChunk / kStep, kGroups = kStep / 16;
  static constexpr int kPairs = D / 16;                                  // of o's elements that a lane has
  static constexpr int kEach = kQueries == 1 ? 1 : 2;                    // queries of which a lane has scores
  using Half = std::conditional_t<kBytes, __half, E>;                    // what mma multiplies
  using SlotBits = std::conditional_t<kStep == 64, uint64_t, uint32_t>;  // which slots of a step are seen

  // Those of step `at`, of its tile's.
  static __device__ SlotBits bits_of(uint64_t tile, unsigned at) {
    const uint64_t mine = tile >> at % kStepsOfTile * kStep;
    return SlotBits(kStep == 16 ? mine & 0xffffu : mine);
  }

  uint32_t query[D / 8], key[kGroups][2][kRow / 16], value[kGroups][4][kRow / 32];
  float o[kPairs][2][kEach], top[kEach], sum[kEach];
  float scale2[kEach], k_scale, v_scale;  // log2(e) scale; of the pages whose keys and values are here
  int g, c;

  // row: of query g where there are eight; of E, or of either dtype of 16 bits before a cache of bytes.
  __device__ Worker(const uint16_t* row, DType dtype, float scale) {
    g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    k_scale = v_scale = 1.f;
    clear();
#pragma unroll
    for (int j = 0; j < kEach; ++j) scale2[j] = scale;
    if constexpr (!kBytes) {
      load_share<kRow, 4>(query, row, c);
    } else {  // as f16, and the largest between 1 and 2, which no bf16 can leave f16's range by
      float x[D / 4], most = 0.f;
#pragma unroll
      for (int w = 0; w < D / 16; ++w) {
        const Floats<4> four = load<4>(row, dtype, word_offset<kRow, 4>(w, c));
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * w + i] = four.v[i], most = fmaxf(most, fabsf(four.v[i]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const uint32_t exponent = max(127u - 40u, min(253u, __float_as_uint(most) >> 23));
      const float down = __uint_as_float((254u - exponent) << 23);
#pragma unroll
      for (int j = 0; j < kEach; ++j)  // of the queries whose scores the lane has
        scale2[j] *= __uint_as_float(__shfl_sync(0xffffffffu, exponent, 4 * (2 * c + j)) << 23) * kHalvesScale;
#pragma unroll
      for (int w = 0; w < D / 16; ++w)
#pragma unroll
        for (int i = 0; i < 2; ++i) query[2 * w + i] = ptx::pack2<__half>(x[4 * w + i] * down, x[4 * w + 2 + i] * down);
    }
  }
  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      top[j] = -INFINITY, sum[j] = 0.f;
#pragma unroll
      for (int a = 0; a < kPairs; ++a) o[a][0][j] = o[a][1][j] = 0.f;
    }
  }

  // Places first.. of a head; behind `last` the last one stands again, and is hidden later.
  __device__ void load_keys(const Slots& k, const float* scales, int first, int last) {
    if (scales) k_scale = __ldg(scales + first / kTile);
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_share<kRow, 4>(key[i][half], k[min(first + 16 * i + 8 * half + g, last)], c);
  }
  __device__ void load_values(const Slots& v, const float* scales, int first, int last) {
    if (scales) v_scale = __ldg(scales + first / kTile);
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)  // the order in which mix() wants them
        load_share<kRow, 8>(value[i][j], v[min(first + 16 * i + 2 * c + j / 2 + j % 2 * 8, last)], g);
  }

  // s[i][2 half + j] = scale2 q k^T of slot 16 i + 8 half + g and query 2 c + j (or the only one).
  __device__ void scores(float (&s)[kGroups][4]) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.f;
      const auto &a = key[i][0], &b = key[i][1];
#pragma unroll
      for (int w = 0; w < D / 16; ++w) {
        if constexpr (kBytes) {
          const uint32_t x[4] = {even_halves(a[w]), even_halves(b[w]), odd_halves(a[w]), odd_halves(b[w])};
          ptx::mma_m16n8k16<Half>(s[i], x, query[2 * w], query[2 * w + 1]);
        } else {
          const uint32_t x[4] = {a[2 * w], b[2 * w], a[2 * w + 1], b[2 * w + 1]};
          ptx::mma_m16n8k16<Half>(s[i], x, query[2 * w], query[2 * w + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i][j] *= kBytes ? scale2[j % kEach] * k_scale : scale2[j % kEach];
    }
  }

  // s becomes p, hidden where seen[j] has no bit; maxima and sums are brought up to date. fade: what o is to lose.
  __device__ void softmax(float (&s)[kGroups][4], const SlotBits (&seen)[kEach], float (&fade)[kEach]) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const SlotBits mine = seen[j] >> g;
      float best = -INFINITY, part = 0.f;
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[i][2 * half + j];
          if (!(mine >> (16 * i + 8 * half) & 1)) x = -INFINITY;
          best = fmaxf(best, x);
        }
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, lanes));
      best = fmaxf(best, top[j]);
      const float base = best == -INFINITY ? 0.f : best;  // nothing seen yet: all of p is exp2(-inf)
      fade[j] = ptx::ex2(top[j] - base);
      top[j] = best;
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[i][2 * half + j];
          part += x = ptx::ex2(x - base);
        }
      sum[j] = fmaf(sum[j], fade[j], part);
    }
  }

  // o = fade o + p v.
  __device__ void mix(const float (&p)[kGroups][4], const float (&fade)[kEach]) {
    float part[kPairs][4] = {};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      // Column g of the other operand is query g: slots 2 c and 2 c + 8, then 2 c + 1 and 2 c + 9.
      const uint32_t even = ptx::pack2<Half>(p[i][0], p[i][2]);
      const int from = kQueries == 1 ? 8 * c : 8 * c + g / 2;
      uint32_t x = __shfl_sync(0xffffffffu, even, from), y = __shfl_sync(0xffffffffu, even, from + 4);
      if constexpr (kQueries == 8) {
        const uint32_t odd = ptx::pack2<Half>(p[i][1], p[i][3]);
        const uint32_t x1 = __shfl_sync(0xffffffffu, odd, from), y1 = __shfl_sync(0xffffffffu, odd, from + 4);
        if (g % 2) x = x1, y = y1;
      }
      const auto& v = value[i];
#pragma unroll
      for (int w = 0; w < kRow / 32; ++w) {
        const uint32_t low[2] = {lower_of(v[0][w], v[1][w]), lower_of(v[2][w], v[3][w])};
        const uint32_t up[2] = {upper_of(v[0][w], v[1][w]), upper_of(v[2][w], v[3][w])};
        if constexpr (kBytes) {
          const uint32_t a[4] = {even_halves(low[0]), odd_halves(low[0]), even_halves(low[1]), odd_halves(low[1])};
          const uint32_t b[4] = {even_halves(up[0]), odd_halves(up[0]), even_halves(up[1]), odd_halves(up[1])};
          ptx::mma_m16n8k16<Half>(part[2 * w], a, x, y);
          ptx::mma_m16n8k16<Half>(part[2 * w + 1], b, x, y);
        } else {
          const uint32_t a[4] = {low[0], up[0], low[1], up[1]};
          ptx::mma_m16n8k16<Half>(part[w], a, x, y);
        }
      }
    }
    const float factor = kBytes ? v_scale * kHalvesScale : 1.f;
#pragma unroll
    for (int a = 0; a < kPairs; ++a)
#pragma unroll
      for (int d = 0; d < 2; ++d)
#pragma unroll
        for (int j = 0; j < kEach; ++j) o[a][d][j] = fmaf(o[a][d][j], fade[j], __fmul_rn(part[a][2 * d + j], factor));
  }

  // The step after `at` of a warp that has every so manieth chunk.
  static __device__ unsigned after(unsigned at, int warps) { return ++at % kSteps ? at : at + (warps - 1) * kSteps; }

  // Of the first step from `at` on that next() gives to the last of a warp that has every so manieth chunk: steps are
  // counted from slot first_slot on, of `slots`. next(at) moves `at` on to a step of this warp that has something to
  // see, seen(at, bits) says what, done(chunk) takes it away.
  template <class Next, class Seen, class Done>
  __device__ void walk(const Cache<E>& cache, int bh, int first_slot, int slots, unsigned at, int warps, Next next,
                       Seen seen, Done done) {
    const Slots k = slots_of(cache.k, bh), v = slots_of(cache.v, bh);
    const float *k_scales = kBytes ? cache.k_scale[bh] : nullptr, *v_scales = kBytes ? cache.v_scale[bh] : nullptr;
    bool more = next(at);
    int shift = 0;  // of the step whose keys are here
    const auto keys = [&] {
      shift = cache.shift(first_slot + at * kStep);
      load_keys(k, k_scales, first_slot + at * kStep + shift, slots - 1 + shift);
    };
    const auto values = [&] { load_values(v, v_scales, first_slot + at * kStep + shift, slots - 1 + shift); };
    if (more) keys(), values();
    while (more) {
      const unsigned now = at;
      at = after(at, warps);
      float s[kGroups][4], fade[kEach];
      SlotBits bits[kEach];
      scores(s);
      more = next(at);
      if (more) keys();
      seen(now, bits);
      softmax(s, bits, fade);
      mix(s, fade);
      if (more) values();
      if (!more || at / kSteps != now / kSteps) done(now / kSteps), clear();
    }
  }

  // Into record[j], [D + 2], of query 2 c + j, or of the only one; nowhere where it is null.
  __device__ void store(float* const (&record)[kEach]) const {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      float all = sum[j];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) all += __shfl_xor_sync(0xffffffffu, all, lanes);
      if (!record[j] || (kQueries == 1 && c)) continue;
#pragma unroll
      for (int a = 0; a < kPairs; ++a) {
        const int word = kBytes ? a / 2 : a,
                  d = word_offset<kRow, 8>(word, g) / int(sizeof(E)) + (kBytes ? a % 2 * 2 : 0);
        *reinterpret_cast<float2*>(record[j] + d) = make_float2(o[a][0][j], o[a][1][j]);
      }
      if (g == 0) *reinterpret_cast<float2*>(record[j] + D) = make_float2(top[j], all);
    }
  }
};

// What chunks add up to: thread t has elements t, t + threads, ... of o.
template <int D>
struct Total {
  float top = -INFINITY, sum = 0.f, o[D / 32] = {};
  // A record's; of a chunk of which nothing was seen the sum is zero, and the rest may be anything.
  struct Chunk {
    float sum = 0.f, top, o[D / 32];
    __device__ void read(const float* record) {
      sum = record[D + 1], top = record[D];
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const int d = i * blockDim.x + threadIdx.x;
        if (d < D) o[i] = record[d];
      }
    }
  };
  __device__ void add(const float* records) { add<1>(records, 1); }
  // So many records in their order, of which kAhead are on their way at a time.
  template <int kAhead>
  __device__ void add(const float* records, int count) {
    for (int first = 0; first < count; first += kAhead, records += kAhead * (D + 2)) {
      Chunk chunk[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i < count) chunk[i].read(records + i * (D + 2));
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (chunk[i].sum != 0.f) add(chunk[i]);
    }
  }
  __device__ void add(const Chunk& x) {
    const float next = fmaxf(top, x.top), fade = ptx::ex2(top - next), share = ptx::ex2(x.top - next);
    top = next, sum = fmaf(sum, fade, __fmul_rn(x.sum, share));
#pragma unroll
    for (int i = 0; i < D / 32; ++i) o[i] = fmaf(o[i], fade, __fmul_rn(x.o[i], share));
  }
  // As a record: adding it to nothing gives it back.
  __device__ void keep(float* record) const {
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const int d = i * blockDim.x + threadIdx.x;
      if (d < D) record[d] = o[i];
    }
    if (threadIdx.x == 0) record[D] = top, record[D + 1] = sum;
  }
  __device__ void store(uint16_t* row, DType dtype) const {
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const int d = i * blockDim.x + threadIdx.x;
      if (d < D) cuda::store<1>(row, dtype, d, Floats<1>{{o[i] * inverse}});
    }
  }
};

}  // namespace decode
}  // namespace cuda
}  // namespace igpt
