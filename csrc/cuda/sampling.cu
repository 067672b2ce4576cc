// sample_tokens: one token a row, where the distribution function of
// softmax(logits / temperature) exceeds a uniform
//
// logits [N, V] f32, bf16 or f16   uniforms [N] f64   tokens [N] i64.   One
// block a row. p = exp((z - largest z) / temperature) waits in shared memory.
// Only where top_k or top_p cut, keys (z, lowest index first) are sorted there
// by a bitonic network, every token of a rank past the cut gets p = 0, and the
// walk goes by index again. Weights and sums are doubles, as in the reference,
// added in a fixed order that is not the reference's: a run of neighbours a
// thread, then the runs. A token can differ from the reference's only where a
// uniform (or top_p) lies within some 1e-13 of a step of the sums; a token of p
// = 0 is never drawn, and tokens past the cut have exactly 0. Temperature 0:
// the largest logit, the first of equals. -1 for a row with NaN, +inf, or
// nothing but -inf. Bound by latency: V logits are few bytes; a block passes
// some 10 barriers, and with a cut log2(V) (log2(V) + 1) / 2 more (45 of V =
// 512, 78 of 4096). Refuses V > 8192, whose weights and keys fill the shared
// memory.
//
// sass sample_tokens_kernel: LOCAL = 0
#include "../common/check.h"
#include "device.cuh"
#include "launch.h"

namespace igpt {
namespace cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostColumns = 8192;
constexpr size_t kStatic = 2048, kAlways = 48 * 1024 - kStatic;  // of shared memory: static arrays; what needs no leave
constexpr float kLargest = 3.402823466e+38f;

struct Rule {
  double temperature, top_p;
  int top_k;  // at most V; V keeps all
};

// ---- keys: greater is before ----

__device__ inline uint64_t key_of(float z, int index) {
  const uint32_t u = __float_as_uint(z + 0.f);  // -0 and 0 are equal: both become 0
  return uint64_t(u & 0x80000000u ? ~u : u | 0x80000000u) << 32 | uint32_t(~index);
}
__device__ inline float logit_of(uint64_t key) {
  const uint32_t u = uint32_t(key >> 32);
  return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}
__device__ inline int index_of(uint64_t key) {
  return int(~uint32_t(key));
}

// ---- over the block ----

// f folded over the block's values, to every thread. `warps` is 32 elements of
// shared memory.
template <class T, class F>
__device__ inline T block_fold(T x, T* warps, F f) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();  // the last fold's readers are done
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int w = 1; w < kWarps; ++w) x = f(x, warps[w]);
  return x;
}
__device__ inline int block_min(int x, int* warps) {
  return block_fold(x, warps, [](int a, int b) { return a < b ? a : b; });
}

// The sum of x over the threads before this one; `total` becomes that over all.
__device__ inline double sum_before(double x, double* warps, double& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  double before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += warps[w];
  }
  const double here = __shfl_up_sync(0xffffffffu, x, 1);
  return lane ? before + here : before;
}

// Descending; `size` is a power of two. Every thread sees the result.
__device__ inline void sort_keys(uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2)
    for (int stride = run / 2; stride; stride /= 2) {
      __syncthreads();
      for (int t = threadIdx.x; t < size / 2; t += kThreads) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const uint64_t a = keys[i], b = keys[j];
        if ((a < b) == !(i & run)) keys[i] = b, keys[j] = a;
      }
    }
  __syncthreads();
}

// ---- the cut ----

// How many of the sorted keys top_k and top_p keep.
__device__ inline int kept_of(const uint64_t* keys, const double* p, const Rule& rule, double* sums, int* ints) {
  const int k = rule.top_k;
  if (rule.top_p >= 1) return k;  // at 1 rounding alone would decide about the tail
  const int run = (k + kThreads - 1) / kThreads, begin = min(int(threadIdx.x) * run, k), end = min(begin + run, k);
  double mine = 0, whole;
  for (int r = begin; r < end; ++r) mine += p[index_of(keys[r])];
  double mass = sum_before(mine, sums, whole);
  int first = k;  // of those before which top_p is reached already
  for (int r = begin; r < end && first == k; ++r) {
    if (!(mass < rule.top_p * whole)) first = r;
    mass += p[index_of(keys[r])];
  }
  return block_min(first, ints);
}

// ---- the kernel ----

__global__ void __launch_bounds__(kThreads)
    sample_tokens_kernel(int64_t* tokens,         // [N]
                         const void* logits,      // [N, V]
                         DType dtype,             // of the logits
                         const double* uniforms,  // [N]
                         int V, Rule rule,
                         int padded) {  // V to a power of two, 0: nothing is cut
  DYN_SMEM(double, p);                  // [V], then padded keys
  STATIC_SMEM(double, sums, 32);
  STATIC_SMEM(uint64_t, words, 32);
  STATIC_SMEM(int, ints, 32);
  uint64_t* keys = reinterpret_cast<uint64_t*>(p + V);
  const int64_t row = int64_t(blockIdx.x) * V;

  uint64_t best = 0;
  int nan = 0;
  for (int i = threadIdx.x; i < V; i += kThreads) {
    const float z = load<1>(logits, dtype, row + i).v[0];
    const uint64_t key = key_of(z, i);
    nan |= z != z;
    best = key > best ? key : best;
    if (padded) keys[i] = key;
  }
  nan = __syncthreads_or(nan);
  best = block_fold(best, words, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  const float top = logit_of(best);
  const bool drawn = !nan && fabsf(top) <= kLargest;
  if (!drawn || rule.temperature == 0) {  // the same for the whole block
    if (threadIdx.x == 0) tokens[blockIdx.x] = drawn ? index_of(best) : -1;
    return;
  }

  for (int i = threadIdx.x; i < V; i += kThreads) {
    const float z = load<1>(logits, dtype, row + i).v[0];
    p[i] = exp((double(z) - double(top)) / rule.temperature);
  }
  if (padded) {
    for (int i = V + threadIdx.x; i < padded; i += kThreads) keys[i] = 0;  // after every logit
    sort_keys(keys, padded);
    const int kept = kept_of(keys, p, rule, sums, ints);
    __syncthreads();  // all have summed what is cut now
    for (int r = kept + threadIdx.x; r < V; r += kThreads) p[index_of(keys[r])] = 0;
  }
  __syncthreads();

  const int run = (V + kThreads - 1) / kThreads, begin = min(int(threadIdx.x) * run, V), end = min(begin + run, V);
  double mine = 0, total;
  for (int i = begin; i < end; ++i) mine += p[i];
  double below = sum_before(mine, sums, total);
  const double wanted = uniforms[blockIdx.x] * total;
  int found = V,
      last = 0;  // last: of the possible tokens, should rounding step past it
  for (int i = begin; i < end; ++i)
    if (p[i] > 0) {
      below += p[i];
      last = i;
      if (found == V && below > wanted) found = i;
    }
  found = block_min(found, ints);
  last = -block_min(-last, ints);
  if (threadIdx.x == 0) tokens[blockIdx.x] = found < V ? found : last;
}

// ---- launcher ----

static void sample_tokens(View tokens, View logits, View uniforms, double temperature, int64_t top_k, double top_p,
                          Stream stream) {
  IGPT_CHECK(is_gpu_float(logits.dtype) && logits.dense(),
             "sample_tokens: logits must be dense float32, bfloat16 or float16");
  IGPT_CHECK(uniforms.dtype == DType::f64 && uniforms.dense() && uniforms.numel() == logits.rows(),
             "sample_tokens: uniforms must be float64, one a row");
  IGPT_CHECK(tokens.dtype == DType::i64 && tokens.dense() && tokens.numel() == logits.rows(),
             "sample_tokens: tokens must be int64, one a row");
  IGPT_CHECK(temperature >= 0 && top_k >= 0 && top_p > 0, "sample_tokens: an option is out of range");
  const int64_t N = logits.rows(), V = logits.cols();
  IGPT_CHECK(V <= kMostColumns, "sample_tokens: at most %d columns, got %lld", kMostColumns, (long long)(V));
  if (N == 0) return;
  const Rule rule{temperature, top_p, int(top_k && top_k < V ? top_k : V)};
  int padded = 0;
  if (temperature > 0 && (rule.top_k < V || top_p < 1))
    for (padded = 1; padded < V;) padded *= 2;
  const size_t bytes = size_t(V) * sizeof(double) + size_t(padded) * sizeof(uint64_t);
  const OnDevice device(logits);
  if (bytes > kAlways) {
    const size_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStatic;
    IGPT_CHECK(bytes <= most, "sample_tokens: %lld columns with top_k or top_p want %zu bytes of shared memory, of %zu",
               (long long)(V), bytes, most);
    allow_shared(sample_tokens_kernel, most);  // the same from any thread, whatever its V
  }
  LAUNCH(sample_tokens_kernel, unsigned(N), kThreads, bytes, stream, tokens.as<int64_t>(), logits.data, logits.dtype,
         uniforms.as<double>(), int(V), rule, padded);
}

void fill_sampling(Ops& t) {
  t.sample_tokens = sample_tokens;
}

}  // namespace cuda
}  // namespace igpt
