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
// Sums are kept in shared memory while K <= 700, else in device memory. Sorted colours come in runs of one token: the
// lanes of a warp that share a token add their values up first (six 32-bit sums by the warp's own instruction, exact
// while weights are below 2^18), and five of them add the totals, so a run costs the atomics of one colour. They are
// whole numbers, so the order of the atomics changes no bit; inertia is computed from them centre by centre with
// 128-bit integers, as on the CPU. Weights cannot be refused here, since no host reads them: where one is negative or
// they exceed 2^45 in all, inertia is NaN and the sums mean nothing. While they are added up, inertia's 8 bytes hold
// sum (w >> 20): coarse, but it cannot overflow, and while it is small, neither have the exact sums.
//
// sass kmeans_sums_kernel: LDS = 4, LOCAL = 0
#include <algorithm>

#include "nearest.cuh"

namespace igpt {
namespace cuda {

constexpr int kShared = 700;           // centres whose sums fit beside a tile of centres in 48 KB
constexpr int64_t kMostBlocks = 2048;  // that add up sums
constexpr Sum kMaxWeight = Sum(1) << 45, kCoarse = 20;
constexpr Sum kSmall = Sum(1) << 18;  // 32 weights below it times 255 fit in 31 bits
constexpr int kCrowd = 4;             // lanes of one token from which adding them up first pays
constexpr uint32_t kAll = 0xffffffffu;

struct Sums {
  Sum *u, *w, *uu;  // [K, 3], [K], [K]
};

__device__ inline void add_moments(const Sums& to, int j, Sum w, Sum r, Sum g, Sum b) {
  atomicAdd(&to.u[3 * j], w * r), atomicAdd(&to.u[3 * j + 1], w * g), atomicAdd(&to.u[3 * j + 2], w * b);
  atomicAdd(&to.w[j], w), atomicAdd(&to.uu[j], w * (r * r + g * g + b * b));
}

// Adds a colour of each lane, those of weight 0 aside. For whole warps.
__device__ inline void add_colors(const Sums& to, int token, Sum w, uint32_t r, uint32_t g, uint32_t b) {
  const int lane = threadIdx.x % 32;
  if (!__all_sync(kAll, w < kSmall)) {
    if (w) add_moments(to, token, w, r, g, b);
    return;
  }
  uint32_t open = __ballot_sync(kAll, w != 0);
  while (open) {
    const int j = __shfl_sync(kAll, token, __ffs(int(open)) - 1);
    const uint32_t group = __ballot_sync(kAll, token == j) & open;
    const bool mine = group >> lane & 1;
    open &= ~group;
    if (__popc(group) < kCrowd) {
      if (mine) add_moments(to, j, w, r, g, b);
      continue;
    }
    const uint32_t n = mine ? uint32_t(w) : 0;
    const Sum square = Sum(n) * (r * r + g * g + b * b);
    const Sum red = __reduce_add_sync(kAll, n * r), green = __reduce_add_sync(kAll, n * g);
    const Sum blue = __reduce_add_sync(kAll, n * b), weight = __reduce_add_sync(kAll, n);
    const Sum low = __reduce_add_sync(kAll, uint32_t(square) & 0xffffff);
    const Sum high = __reduce_add_sync(kAll, uint32_t(square >> 24));
    if (lane < 3) atomicAdd(&to.u[3 * j + lane], lane == 0 ? red : lane == 1 ? green : blue);
    if (lane == 3) atomicAdd(&to.w[j], weight);
    if (lane == 4) atomicAdd(&to.uu[j], low + (high << 24));
  }
}

// Adds to sums that start at zero.
__global__ void __launch_bounds__(kThreads) kmeans_sums_kernel(Sums sums, Sum* coarse,  // [1]
                                                               const uint8_t* colors,   // [N, 3]
                                                               const Sum* weights,      // [N]
                                                               const float* palette,    // [K, 3]
                                                               const uint16_t* table,   // [2^24] or nothing
                                                               int64_t N, int K, bool shared) {
  DYN_SMEM(Sum, block);  // [5, K] or nothing
  STATIC_SMEM(float4, centers, kTile);
  STATIC_SMEM(float, levels, 256);
  fill_levels(levels);
  for (int j = threadIdx.x; shared && j < 5 * K; j += kThreads) block[j] = 0;
  const Sums to = shared ? Sums{block, block + 3 * K, block + 4 * K} : sums;
  __syncthreads();

  Sum mine = 0;
  for (int64_t tile = int64_t(blockIdx.x) * kBlock; tile < N; tile += int64_t(gridDim.x) * kBlock) {
    const int64_t first = tile + threadIdx.x;
    int token[kPixels] = {};
    if (!table) nearest(token, colors, first, N, palette, K, {centers, levels});
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int64_t i = first + p * kThreads;
      const bool there = i < N;
      const Sum w = there ? weights[i] : 0;
      const uint32_t r = there ? colors[3 * i] : 0, g = there ? colors[3 * i + 1] : 0,
                     b = there ? colors[3 * i + 2] : 0;
      if (table) token[p] = table[table_index(r << 16 | g << 8 | b)];
      mine += w <= kMaxWeight ? w >> kCoarse : kMaxWeight;  // negative ones are large
      add_colors(to, token[p], w, r, g, b);
    }
  }
  if (mine) atomicAdd(coarse, mine);
  if (!shared) return;
  __syncthreads();
  for (int j = threadIdx.x; j < K; j += kThreads) {
    if (to.w[j] == 0) continue;
    for (int a = 0; a < 3; ++a) atomicAdd(&sums.u[3 * j + a], to.u[3 * j + a]);
    atomicAdd(&sums.w[j], to.w[j]), atomicAdd(&sums.uu[j], to.uu[j]);
  }
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
  const int64_t blocks = std::min((N + kBlock - 1) / kBlock, kMostBlocks);
  if (N > 0)
    LAUNCH(kmeans_sums_kernel, unsigned(blocks), kThreads, shared ? size_t(K) * 5 * sizeof(Sum) : 0, stream,
           Sums{sums.as<Sum>(), counts.as<Sum>(), squares.as<Sum>()}, inertia.as<Sum>(), colors.as<uint8_t>(),
           weights.as<Sum>(), palette.as<float>(), table.as<uint16_t>(), N, int(K), shared);
  LAUNCH(kmeans_inertia_kernel, 1u, kThreads, size_t(K) * sizeof(double), stream, inertia.as<double>(), sums.as<Sum>(),
         counts.as<Sum>(), squares.as<Sum>(), palette.as<float>(), int(K));
}

void fill_kmeans(Ops& t) {
  t.kmeans_step = kmeans_step;
}

}  // namespace cuda
}  // namespace igpt
