// kmeans_step:     over the colours of token j:  sums_j = sum w u    counts_j = sum w    squares_j = sum w |u|^2
//                  inertia = sum_j w |x - c_j|^2, which follows from the three
//
// colors [N, 3] u8   weights [N] i64   palette [K, 3] f32, K <= 4096   table i16 [2^24], optional, of palette_table
// sums [K, 3], counts, squares [K] i64   inertia f64
//
// Tokens come from the table where there is one, else from every distance (nearest.cuh): 2^20 colours with 512 centres
// are 6 * 10^9 operations, 0.2 ms at 28 T/s, beside the 30 us that a table costs. With a table a colour reads 3 + 8
// bytes and a sector of 32 that it shares with its neighbours in the list: 8 million colours of 1.3 Gpixel move 88 MB
// and at most 34 MB of table, 30 us.
//
// Sums are kept in shared memory while K <= 700, else in device memory. With a table a thread has 8 neighbours of the
// list and adds them up in registers until the token changes: sorted colours come in runs, 1.5 to 3 in 8. Then five
// sums are added, each as two words, because shared memory adds 64 bits only by compare and swap. A block has one
// stretch of the list, so it knows few tokens when it adds its sums to those of all, where equal addresses take turns.
// They are whole numbers, so the order of the atomics changes no bit; inertia is computed from them centre by centre
// with 128-bit integers, as on the CPU. Weights cannot be refused here, since no host reads them: where one is negative
// or they exceed 2^45 in all, inertia is NaN and the sums mean nothing. While they are added up, inertia's 8 bytes hold
// sum (w >> 20): coarse, but it cannot overflow, and while it is small, neither have the exact sums.
//
// sass kmeans_sums_kernel: LDS = 4, LOCAL = 0
// sass kmeans_table_kernel: LOCAL = 0
#include <algorithm>

#include "nearest.cuh"

namespace igpt {
namespace cuda {

constexpr int kShared = 700;  // centres whose sums fit beside a tile of centres in 48 KB
constexpr int kRun = 8;       // neighbours of a thread, with a table
constexpr int kRunThreads = 256;
constexpr int64_t kMostBlocks = 396;  // three for each multiprocessor of an H200: each adds all its sums to the whole
constexpr Sum kMaxWeight = Sum(1) << 45, kCoarse = 20;

struct Sums {
  Sum *u, *w, *uu;  // [K, 3], [K], [K]
};

// What colours of one token add up to.
struct Moments {
  Sum r = 0, g = 0, b = 0, w = 0, uu = 0;
  __device__ void add(uint32_t color, Sum weight) {
    const uint32_t x = color >> 16, y = color >> 8 & 255, z = color & 255;
    r += weight * x, g += weight * y, b += weight * z, w += weight, uu += weight * (x * x + y * y + z * z);
  }
};

// A sum of 64 bits in two arrays of words: shared memory adds words by itself, 64 bits only by trying until it
// succeeds.
__device__ inline void add_words(uint32_t* low, uint32_t* high, Sum v) {
  const uint32_t more = uint32_t(v), before = atomicAdd(low, more);
  const uint32_t carried = uint32_t(v >> 32) + (before + more < before);
  if (carried) atomicAdd(high, carried);
}

__device__ inline void add_sums(const Sums& to, int j, const Moments& m) {
  atomicAdd(&to.u[3 * j], m.r), atomicAdd(&to.u[3 * j + 1], m.g), atomicAdd(&to.u[3 * j + 2], m.b);
  atomicAdd(&to.w[j], m.w), atomicAdd(&to.uu[j], m.uu);
}

// The block's sums: words [2, 5, K] of shared memory, or nothing, where all goes to device memory at once.
struct Block {
  uint32_t* words;
  int K;
  __device__ void clear() const {
    for (int i = threadIdx.x; words && i < 10 * K; i += blockDim.x) words[i] = 0;
  }
  __device__ void add(const Sums& sums, int j, const Moments& m) const {
    if (m.w == 0) return;
    if (!words) return add_sums(sums, j, m);
    uint32_t *low = words + j, *high = low + 5 * K;
    add_words(low, high, m.r), add_words(low + K, high + K, m.g), add_words(low + 2 * K, high + 2 * K, m.b);
    add_words(low + 3 * K, high + 3 * K, m.w), add_words(low + 4 * K, high + 4 * K, m.uu);
  }
  // Once all threads have added.
  __device__ void flush(const Sums& sums) const {
    for (int j = threadIdx.x; words && j < K; j += blockDim.x) {
      const auto sum = [&](int a) { return Sum(words[(5 + a) * K + j]) << 32 | words[a * K + j]; };
      Moments m;
      m.r = sum(0), m.g = sum(1), m.b = sum(2), m.w = sum(3), m.uu = sum(4);
      if (m.w) add_sums(sums, j, m);
    }
  }
};

__device__ inline Sum coarse_weight(Sum w) {
  return w <= kMaxWeight ? w >> kCoarse : kMaxWeight;  // negative ones are large
}

// Adds to sums that start at zero, by every distance.
__global__ void __launch_bounds__(kThreads) kmeans_sums_kernel(Sums sums, Sum* coarse,  // [1]
                                                               const uint8_t* colors,   // [N, 3]
                                                               const Sum* weights,      // [N]
                                                               const float* palette,    // [K, 3]
                                                               int64_t N, int K, bool shared) {
  DYN_SMEM(uint32_t, words);  // [2, 5, K] or nothing
  STATIC_SMEM(float4, centers, kTile);
  STATIC_SMEM(float, levels, 256);
  const Block block{shared ? words : nullptr, K};
  fill_levels(levels);
  block.clear();
  __syncthreads();
  Sum mine = 0;
  for (int64_t tile = int64_t(blockIdx.x) * kBlock; tile < N; tile += int64_t(gridDim.x) * kBlock) {
    const int64_t first = tile + threadIdx.x;
    int token[kPixels];
    nearest(token, colors, first, N, palette, K, {centers, levels});
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int64_t i = first + p * kThreads;
      if (i >= N) continue;
      Moments m;
      m.add(color_at(colors, i), weights[i]);
      mine += coarse_weight(m.w);
      block.add(sums, token[p], m);
    }
  }
  if (mine) atomicAdd(coarse, mine);
  __syncthreads();
  block.flush(sums);
}

// The same by a table. A block has neighbours in the list, so that its colours have few tokens.
__global__ void __launch_bounds__(kRunThreads, 3) kmeans_table_kernel(Sums sums, Sum* coarse,  // [1]
                                                                      const uint8_t* colors,   // [N, 3]
                                                                      const Sum* weights,      // [N]
                                                                      const uint16_t* table,   // [2^24]
                                                                      int64_t N, int K, bool shared, bool wide) {
  DYN_SMEM(uint32_t, words);  // [2, 5, K] or nothing
  const Block block{shared ? words : nullptr, K};
  block.clear();
  __syncthreads();
  Sum mine = 0;
  const int64_t runs = (N + kRun - 1) / kRun, each = (runs + gridDim.x - 1) / gridDim.x;
  const int64_t end = min(runs, each * (blockIdx.x + 1));
  for (int64_t run = each * blockIdx.x + threadIdx.x; run < end; run += kRunThreads) {
    uint32_t color[kRun];
    Sum w[kRun];
    if (wide && run * kRun + kRun <= N) {
      const uint2* from = reinterpret_cast<const uint2*>(colors + run * kRun * 3);
      const auto* pairs = reinterpret_cast<const ulonglong2*>(weights + run * kRun);
      const uint2 x = from[0], y = from[1], z = from[2];
      const uint32_t bytes[6] = {x.x, x.y, y.x, y.y, z.x, z.y};
#pragma unroll
      for (int k = 0; k < kRun / 2; ++k) {
        const ulonglong2 pair = pairs[k];
        w[2 * k] = pair.x, w[2 * k + 1] = pair.y;
      }
      unpack(color, bytes);
    } else {
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const int64_t i = run * kRun + k;
        color[k] = i < N ? color_at(colors, i) : 0;
        w[k] = i < N ? weights[i] : 0;
      }
    }
    int token[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) token[k] = table[table_index(color[k])];
    Moments m;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (k && token[k] != token[k - 1]) {
        block.add(sums, token[k - 1], m);
        m = Moments();
      }
      m.add(color[k], w[k]);
      mine += coarse_weight(w[k]);
    }
    block.add(sums, token[kRun - 1], m);
  }
  if (mine) atomicAdd(coarse, mine);
  __syncthreads();
  block.flush(sums);
}

// sum of w |x - c|^2 over a centre's colours: the scatter about their mean, in
// integers but for the last division, plus their weight times the squared
// distance from that mean to the centre. In levels, 0..255. Rounded as on the
// CPU.
__device__ inline double inertia_of(const Sum* u, Sum w, Sum uu, const float* center) {
  if (w == 0) return 0;
  __int128 scatter = __int128(w) * uu;
  double moved = 0;
  for (int a = 0; a < 3; ++a) {
    scatter -= __int128(u[a]) * u[a];
    const double mean = __ddiv_rn(double(u[a]), double(w));
    const double offset = __dsub_rn(__dmul_rn(127.5, double(center[a]) + 1), mean);
    moved = __dadd_rn(moved, __dmul_rn(offset, offset));
  }
  const double levels = __dadd_rn(__ddiv_rn(double(scatter), double(w)), __dmul_rn(double(w), moved));
  return __ddiv_rn(levels, 127.5 * 127.5);
}

// One block. inertia holds the coarse sum of the weights until its last line.
__global__ void __launch_bounds__(kThreads) kmeans_inertia_kernel(double* inertia,       // [1]
                                                                  const Sum* sums,       // [K, 3]
                                                                  const Sum* counts,     // [K]
                                                                  const Sum* squares,    // [K]
                                                                  const float* palette,  // [K, 3]
                                                                  int K) {
  DYN_SMEM(double, part);  // [K]
  STATIC_SMEM(Sum, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  for (int j = threadIdx.x; j < K; j += kThreads) {
    part[j] = inertia_of(sums + 3 * j, counts[j], squares[j], palette + 3 * j);
    if (counts[j]) atomicAdd(&total[0], counts[j]);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int j = 0; j < K; ++j) sum += part[j];  // one after the other: the CPU's order
  const Sum coarse = *reinterpret_cast<const Sum*>(inertia);
  *inertia = coarse <= kMaxWeight >> kCoarse && total[0] <= kMaxWeight ? sum : NAN;
}

// ---- launchers ----

static void check_sums(const View& v, int64_t count, const char* name) {
  IGPT_CHECK(v.dtype == DType::i64 && v.dense() && v.numel() == count,
             "kmeans_step: %s must be dense int64 of %lld elements", name, (long long)(count));
}

static void kmeans_step(View sums, View counts, View squares, View inertia, View colors, View weights, View palette,
                        View table, Stream stream) {
  check_colors(colors, palette);
  check_table(table, colors);
  const int64_t N = colors.rows(), K = palette.size[0];
  IGPT_CHECK(colors.dtype == DType::u8, "kmeans_step: colors must be uint8");
  check_sums(weights, N, "weights"), check_sums(sums, 3 * K, "sums"), check_sums(counts, K, "counts");
  check_sums(squares, K, "squares");
  IGPT_CHECK(inertia.dtype == DType::f64 && inertia.numel() == 1, "kmeans_step: inertia must be one float64");
  const OnDevice device(colors);
  for (const View& v : {sums, counts, squares, inertia})
    check_cuda(cudaMemsetAsync(v.data, 0, size_t(v.numel()) * 8, stream_of(stream)), "cudaMemsetAsync");
  const bool shared = K <= kShared;
  const size_t bytes = shared ? size_t(K) * 5 * sizeof(Sum) : 0;
  const auto blocks = [&](int64_t each) { return unsigned(std::min((N + each - 1) / each, kMostBlocks)); };
  const Sums to{sums.as<Sum>(), counts.as<Sum>(), squares.as<Sum>()};
  if (N > 0 && table)
    LAUNCH(kmeans_table_kernel, blocks(kRun * kRunThreads), kRunThreads, bytes, stream, to, inertia.as<Sum>(),
           colors.as<uint8_t>(), weights.as<Sum>(), table.as<uint16_t>(), N, int(K), shared,
           starts_at_sixteen(colors) && starts_at_sixteen(weights));
  else if (N > 0)
    LAUNCH(kmeans_sums_kernel, blocks(kBlock), kThreads, bytes, stream, to, inertia.as<Sum>(), colors.as<uint8_t>(),
           weights.as<Sum>(), palette.as<float>(), N, int(K), shared);
  LAUNCH(kmeans_inertia_kernel, 1u, kThreads, size_t(K) * sizeof(double), stream, inertia.as<double>(), sums.as<Sum>(),
         counts.as<Sum>(), squares.as<Sum>(), palette.as<float>(), int(K));
}

void fill_kmeans(Ops& t) {
  t.kmeans_step = kmeans_step;
}

}  // namespace cuda
}  // namespace igpt
