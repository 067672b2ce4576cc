// palette_assign:  token = argmin_j d_j, lowest j on ties    d = (dr*dr +
// dg*dg) + db*db    dr = x_r - c_r; g, b alike
//                  x = u / 127.5 - 1 for uint8 pixels
// kmeans_step:     over the colours of token j:  sums_j = sum w u    counts_j =
// sum w    squares_j = sum w |u|^2
//                  inertia = sum_j w |x - c_j|^2, which follows from the three
//
// pixels [N, 3] u8 or f32   palette [K, 3] f32, K <= 4096   tokens [N] i64, i32
// or i16 colors [N, 3] u8   weights [N] i64   sums [K, 3], counts, squares [K]
// i64   inertia f64
//
// Every operation of d is rounded to float32 on its own (the _rn intrinsics are
// never fused), so that tokens are the CPU's to the bit. A d that is not a
// number counts as infinite. A thread has four pixels in registers and compares
// them with each centre, which shared memory gives to the whole warp in one
// read of 16 bytes. Bound by arithmetic: 8 operations, a comparison and two
// selections a distance, 11 K a pixel (5,632 of K = 512), beside 5 to 20 bytes.
//
// kmeans_step keeps its sums in shared memory while K <= 700, else in device
// memory. They are integers, so the order of the atomics changes no bit;
// inertia is computed from them centre by centre with 128-bit integers, as on
// the CPU. Weights cannot be refused here, since no host reads them: where one
// is negative or they exceed 2^45 in all, inertia is NaN and the sums mean
// nothing. While they are added up, inertia's 8 bytes hold sum (w >> 20):
// coarse, but it cannot overflow, and while it is small, neither have the exact
// sums.
#include <algorithm>

#include "../common/check.h"
#include "device.cuh"
#include "launch.h"

namespace igpt {
namespace cuda {

using Sum = unsigned long long;  // what 64-bit atomics add

constexpr int kThreads = 128, kPixels = 4, kBlock = kThreads * kPixels;
constexpr int kMaxColors = 4096;
constexpr int kTile = 1024;            // centres in shared memory at a time, 16 KB
constexpr int kShared = 700;           // centres whose sums fit beside them in 48 KB
constexpr int64_t kMostBlocks = 2048;  // that add up sums
constexpr Sum kMaxWeight = Sum(1) << 45, kCoarse = 20;

// ---- nearest centres, which the whole block finds together ----

struct Tables {
  float4* centers;  // [kTile] of shared memory
  float* levels;    // [256]
};

__device__ inline void fill_levels(float* levels) {
  for (int u = threadIdx.x; u < 256; u += kThreads) levels[u] = __fsub_rn(__fdiv_rn(float(u), 127.5f), 1.f);
}

__device__ inline float component(const float* pixels, int64_t at, const float*) {
  return pixels[at];
}
__device__ inline float component(const uint8_t* pixels, int64_t at, const float* levels) {
  return levels[pixels[at]];
}

__device__ inline float distance(float r, float g, float b, const float4& c) {
  const float dr = __fsub_rn(r, c.x), dg = __fsub_rn(g, c.y), db = __fsub_rn(b, c.z);
  return __fadd_rn(__fadd_rn(__fmul_rn(dr, dr), __fmul_rn(dg, dg)), __fmul_rn(db, db));
}

// token[p] becomes that of pixel first + p kThreads, where there is one.
template <class T>
__device__ inline void nearest(int (&token)[kPixels], const T* pixels, int64_t first, int64_t N, const float* palette,
                               int K, const Tables& tables) {
  float x[kPixels][3] = {}, best[kPixels];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int64_t i = first + p * kThreads;
    token[p] = 0, best[p] = INFINITY;
    if (i < N)
#pragma unroll
      for (int a = 0; a < 3; ++a) x[p][a] = component(pixels, 3 * i + a, tables.levels);
  }
  for (int begin = 0; begin < K; begin += kTile) {
    const int count = min(kTile, K - begin);
    __syncthreads();  // the last tile's readers are done
    for (int j = threadIdx.x; j < count; j += kThreads) {
      const float* c = palette + 3 * (begin + j);
      tables.centers[j] = make_float4(c[0], c[1], c[2], 0.f);
    }
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const float4 c = tables.centers[j];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const float d = distance(x[p][0], x[p][1], x[p][2], c);
        if (d < best[p]) best[p] = d, token[p] = begin + j;
      }
    }
  }
}

// ---- kernels ----

template <class T, class Token>
__global__ void __launch_bounds__(kThreads) palette_assign_kernel(Token* tokens,         // [N]
                                                                  const T* pixels,       // [N, 3]
                                                                  const float* palette,  // [K, 3]
                                                                  int64_t N, int K) {
  STATIC_SMEM(float4, centers, kTile);
  STATIC_SMEM(float, levels, 256);
  fill_levels(levels);
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  int token[kPixels];
  nearest(token, pixels, first, N, palette, K, {centers, levels});
#pragma unroll
  for (int p = 0; p < kPixels; ++p)
    if (first + p * kThreads < N) tokens[first + p * kThreads] = Token(token[p]);
}

// Adds to sums that start at zero.
__global__ void __launch_bounds__(kThreads) kmeans_sums_kernel(Sum* sums,              // [K, 3]
                                                               Sum* counts,            // [K]
                                                               Sum* squares,           // [K]
                                                               Sum* coarse,            // [1]
                                                               const uint8_t* colors,  // [N, 3]
                                                               const Sum* weights,     // [N]
                                                               const float* palette,   // [K, 3]
                                                               int64_t N, int K, bool shared) {
  DYN_SMEM(Sum, block);  // [5, K] or nothing
  STATIC_SMEM(float4, centers, kTile);
  STATIC_SMEM(float, levels, 256);
  fill_levels(levels);
  for (int j = threadIdx.x; shared && j < 5 * K; j += kThreads) block[j] = 0;
  Sum *s = shared ? block : sums, *n = shared ? block + 3 * K : counts, *q = shared ? block + 4 * K : squares;
  __syncthreads();

  Sum mine = 0;
  for (int64_t tile = int64_t(blockIdx.x) * kBlock; tile < N; tile += int64_t(gridDim.x) * kBlock) {
    const int64_t first = tile + threadIdx.x;
    int token[kPixels];
    nearest(token, colors, first, N, palette, K, {centers, levels});
    for (int p = 0; p < kPixels; ++p) {
      const int64_t i = first + p * kThreads;
      if (i >= N) continue;
      const Sum w = weights[i], r = colors[3 * i], g = colors[3 * i + 1], b = colors[3 * i + 2];
      mine += w <= kMaxWeight ? w >> kCoarse : kMaxWeight;  // negative ones are large
      const int j = token[p];
      atomicAdd(&s[3 * j], w * r), atomicAdd(&s[3 * j + 1], w * g), atomicAdd(&s[3 * j + 2], w * b);
      atomicAdd(&n[j], w), atomicAdd(&q[j], w * (r * r + g * g + b * b));
    }
  }
  if (mine) atomicAdd(coarse, mine);
  if (!shared) return;
  __syncthreads();
  for (int j = threadIdx.x; j < K; j += kThreads) {
    if (n[j] == 0) continue;
    for (int a = 0; a < 3; ++a) atomicAdd(&sums[3 * j + a], s[3 * j + a]);
    atomicAdd(&counts[j], n[j]), atomicAdd(&squares[j], q[j]);
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

static void check_colors(const View& pixels, const View& palette) {
  IGPT_CHECK(pixels.dense() && pixels.cols() == 3, "palette: pixels must be dense [..., 3]");
  IGPT_CHECK(palette.dtype == DType::f32 && palette.dense() && palette.ndim == 2 && palette.cols() == 3 &&
                 palette.size[0] >= 1 && palette.size[0] <= kMaxColors,
             "palette: centres must be dense float32 [K, 3] with 1 <= K <= 4096");
}

template <class T, class Token>
static void assign(const View& tokens, const View& pixels, const View& palette, Stream stream) {
  const int64_t N = pixels.rows();
  if (N == 0) return;
  const OnDevice device(pixels);
  LAUNCH((palette_assign_kernel<T, Token>), unsigned((N + kBlock - 1) / kBlock), kThreads, 0, stream,
         tokens.as<Token>(), pixels.as<T>(), palette.as<float>(), N, int(palette.size[0]));
}

static void palette_assign(View tokens, View pixels, View palette, Stream stream) {
  check_colors(pixels, palette);
  IGPT_CHECK(tokens.dense() && tokens.numel() == pixels.rows(), "palette_assign: tokens must be dense, one a pixel");
  const auto write = [&]<class Token>(Token) {
    if (pixels.dtype == DType::u8) return assign<uint8_t, Token>(tokens, pixels, palette, stream);
    if (pixels.dtype == DType::f32) return assign<float, Token>(tokens, pixels, palette, stream);
    refuse("palette_assign: pixels must be uint8 or float32");
  };
  if (tokens.dtype == DType::i64) return write(int64_t());
  if (tokens.dtype == DType::i32) return write(int32_t());
  if (tokens.dtype == DType::i16) return write(int16_t());
  refuse("palette_assign: tokens must be int64, int32 or int16");
}

static void check_sums(const View& v, int64_t count, const char* name) {
  IGPT_CHECK(v.dtype == DType::i64 && v.dense() && v.numel() == count,
             "kmeans_step: %s must be dense int64 of %lld elements", name, (long long)(count));
}

static void kmeans_step(View sums, View counts, View squares, View inertia, View colors, View weights, View palette,
                        Stream stream) {
  check_colors(colors, palette);
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
           sums.as<Sum>(), counts.as<Sum>(), squares.as<Sum>(), inertia.as<Sum>(), colors.as<uint8_t>(),
           weights.as<Sum>(), palette.as<float>(), N, int(K), shared);
  LAUNCH(kmeans_inertia_kernel, 1u, kThreads, size_t(K) * sizeof(double), stream, inertia.as<double>(), sums.as<Sum>(),
         counts.as<Sum>(), squares.as<Sum>(), palette.as<float>(), int(K));
}

void fill_palette(Ops& t) {
  t.palette_assign = palette_assign;
  t.kmeans_step = kmeans_step;
}

}  // namespace cuda
}  // namespace igpt
