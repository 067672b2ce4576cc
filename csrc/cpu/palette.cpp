// palette_assign:  token = argmin_j d_j, lowest j on ties    d = (dr*dr + dg*dg) + db*db    dr = x_r - c_r; g, b alike
//                  x = u / 127.5 - 1 for uint8 pixels
// kmeans_step:     over the colours of token j:  sums_j = sum w u    counts_j = sum w    squares_j = sum w |u|^2
//                  inertia = sum_j w |x - c_j|^2
//
// pixels [N, 3] u8 or f32   palette [K, 3] f32, K <= 4096   tokens [N] i64, i32 or i16
// colors [N, 3] u8   weights [N] i64, >= 0, at most 2^45 in all   sums [K, 3], counts, squares [K] i64   inertia f64
//
// Every operation of d is rounded to float32 on its own, so that all instruction sets and the reference agree to the
// bit: compile with -ffp-contract=off (checked at start). A d that is not a number counts as infinite.
//
// Few pixels: every distance, one pixel a lane, 11 operations a distance; arithmetic bounds it. Many 8-bit pixels: the
// cube of colours is cut into 32^3 cells of 8^3 colours, each with the list of centres that are nearest to any of its
// colours, exact by construction: 2 to 5 distances a pixel, four at a time, one cache line a pixel, whose latency
// bounds it. The grid lives for one call. Sums are integers, and inertia follows from them: threads change no bit.
#include <algorithm>
#include <type_traits>

#include "../common/check.h"
#include "parallel.h"
#include "simd.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int kMaxColors = 4096;
constexpr int64_t kMaxWeight = int64_t(1) << 45;  // weight * 3 * 255^2 must stay below 2^63
constexpr int64_t kChunk = 4096;                  // pixels a task
constexpr int64_t kBlock = 512;                   // pixels whose tokens wait in the L1 cache for what is done with them
constexpr int kSide = 32, kCells = kSide * kSide * kSide, kCellLevels = 256 / kSide;               // cells
constexpr int kBoxSide = 8, kBoxes = kBoxSide * kBoxSide * kBoxSide, kBoxLevels = 256 / kBoxSide;  // boxes of 4^3 cells
constexpr int kSpare = 512;         // quads a box may spend on cells with more than four candidates
constexpr float kSlack = 1e-5f;     // relative; float32 distances err by less than 1e-6
constexpr float kMaxCenter = 1e6f;  // no overflow in the grid's bounds up to here

typedef float v4f __attribute__((vector_size(16)));
typedef uint32_t v4u __attribute__((vector_size(16)));

template <class V>
static inline V distance(V dr, V dg, V db) {
  return (dr * dr + dg * dg) + db * db;
}

// Four candidates, padded with copies of the last, and where the cell's others are.
struct alignas(64) Quad {
  v4f r, g, b;
  uint16_t index[4];
  int32_t next, more;
};
static_assert(sizeof(Quad) == 64, "one cache line");

struct Grid {
  Scratch<Quad> cells;   // [32, 32, 32] the first four candidates of each cell
  Scratch<Quad> others;  // [boxes, kSpare] the rest, then the whole palette for cells that would not fit
};

// Centres side by side, padded to whole vectors.
struct Candidates {
  float *r, *g, *b, *near;  // near: distance to the middle of the box at hand
  int32_t *index, *keep;
  int n;
  static int64_t floats(int64_t K) { return 6 * padded(K); }
  static Candidates at(float* p, int64_t K) {
    const int64_t S = padded(K);
    int32_t* q = reinterpret_cast<int32_t*>(p + 4 * S);
    return {p, p + S, p + 2 * S, p + 3 * S, q, q + S, 0};
  }
};

// All colours x with |x - middle| <= half, a little more for the rounding of both.
struct Box {
  float middle[3], half[3];
  Box(const float* levels, const int (&first)[3], int side) {
    for (int a = 0; a < 3; ++a) {
      const float low = levels[first[a]], high = levels[first[a] + side - 1];
      middle[a] = 0.5f * (low + high);
      half[a] = 0.5f * (high - low) + 1e-6f;
    }
  }
};

static inline vf absolute(vf v) {
  return v < 0 ? -v : v;
}
static inline vi load_i(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store_i(int32_t* p, vi v) {
  std::memcpy(p, &v, sizeof v);
}

// Clears keep[j] where centre i is nearer than j throughout the box. d_j - d_i is linear in x: its least value is the
// one in the middle minus 2 sum_a half_a |c_j - c_i|_a. What float32 may make of it, here and for the pixels, is less
// than the slack.
static void outdo(const Candidates& c, int i, const Box& box) {
  const vf r = splat(c.r[i]), g = splat(c.g[i]), b = splat(c.b[i]), near = splat(c.near[i]);
  const float* h = box.half;
  const vf span = splat(h[0] * h[0] + h[1] * h[1] + h[2] * h[2]);
  for (int j = 0; j < c.n; j += kLanes) {
    const vf reach = 2.f * (h[0] * absolute(load(c.r + j) - r) + h[1] * absolute(load(c.g + j) - g) +
                            h[2] * absolute(load(c.b + j) - b));
    const vf nj = load(c.near + j);
    const vi outdone = nj - near - reach > kSlack * (nj + near + reach + span);
    store_i(c.keep + j, load_i(c.keep + j) & ~outdone);
  }
}

// to = those of `from` that may be nearest to some colour of the box, in the same order. Rivals: the centre nearest to
// the middle, then, where it pays, every survivor. A rival that is itself outdone still counts: being outdone is
// transitive.
static void prune(Candidates& to, const Candidates& from, const Box& box, bool every_rival) {
  const vf mr = splat(box.middle[0]), mg = splat(box.middle[1]), mb = splat(box.middle[2]);
  for (int j = 0; j < from.n; j += kLanes) {
    store(from.near + j, distance(load(from.r + j) - mr, load(from.g + j) - mg, load(from.b + j) - mb));
    store_i(from.keep + j, ~vi{});
  }
  int nearest = 0;
  for (int j = 1; j < from.n; ++j) nearest = from.near[j] < from.near[nearest] ? j : nearest;
  outdo(from, nearest, box);
  const auto compact = [](Candidates& dst, const Candidates& src) {
    int n = 0;
    for (int j = 0; j < src.n; ++j) {
      dst.r[n] = src.r[j], dst.g[n] = src.g[j], dst.b[n] = src.b[j], dst.near[n] = src.near[j],
      dst.index[n] = src.index[j];
      n += src.keep[j] & 1;
    }
    dst.n = n;
  };
  compact(to, from);
  if (!every_rival || to.n <= 4) return;
  for (int j = 0; j < to.n; j += kLanes) store_i(to.keep + j, ~vi{});
  for (int i = 0; i < to.n; ++i) outdo(to, i, box);
  compact(to, to);
}

static void fill_quad(Quad& q, const Candidates& c, int begin) {
  for (int lane = 0; lane < 4; ++lane) {
    const int j = begin + lane < c.n ? begin + lane : c.n - 1;
    q.r[lane] = c.r[j], q.g[lane] = c.g[j], q.b[lane] = c.b[j], q.index[lane] = uint16_t(c.index[j]);
  }
  q.next = q.more = 0;
}

static Grid build_grid(const Candidates& palette, const float* levels) {
  const int K = palette.n, whole = kBoxes * kSpare, quads = (K + 3) / 4;
  Grid grid{scratch<Quad>(kCells), scratch<Quad>(whole + quads)};
  for (int q = 0; q < quads; ++q) fill_quad(grid.others[whole + q], palette, 4 * q);
  const int64_t size = Candidates::floats(K);
  auto room = scratch<float>(max_threads() * 3 * size);
  parallel_for(kBoxes, [&](int64_t box, int thread) {
    float* mine = room.get() + thread * 3 * size;
    Candidates in_box = Candidates::at(mine, K), in_cell = Candidates::at(mine + size, K);
    Candidates all = palette, own = Candidates::at(mine + 2 * size, K);
    all.near = own.near, all.keep = own.keep;  // the rest is shared by all threads
    const int r0 = int(box) / 64 * kBoxLevels, g0 = int(box) / 8 % 8 * kBoxLevels, b0 = int(box) % 8 * kBoxLevels;
    prune(in_box, all, Box(levels, {r0, g0, b0}, kBoxLevels), false);
    int next = int(box) * kSpare;
    const int end = next + kSpare;
    for (int r = r0; r < r0 + kBoxLevels; r += kCellLevels)
      for (int g = g0; g < g0 + kBoxLevels; g += kCellLevels)
        for (int b = b0; b < b0 + kBoxLevels; b += kCellLevels) {
          prune(in_cell, in_box, Box(levels, {r, g, b}, kCellLevels), true);
          Quad& first = grid.cells[(r / kCellLevels * kSide + g / kCellLevels) * kSide + b / kCellLevels];
          fill_quad(first, in_cell, 0);
          const int more = (in_cell.n - 1) / 4;
          if (next + more > end) {
            first = grid.others[whole];
            first.next = whole + 1, first.more = quads - 1;
            continue;
          }
          first.next = next, first.more = more;
          for (int q = 1; q <= more; ++q) fill_quad(grid.others[next++], in_cell, 4 * q);
        }
  });
  return grid;
}

// The least (distance, index) of a quad as one number: distances are not negative, so their bits order as they do.
static inline uint64_t best_of(const Quad& q, v4f r, v4f g, v4f b) {
  const v4f d = distance(r - q.r, g - q.g, b - q.b);
  v4u bits;
  std::memcpy(&bits, &d, sizeof bits);
  uint64_t best = uint64_t(bits[0]) << 32 | q.index[0];
  for (int lane = 1; lane < 4; ++lane) {
    const uint64_t key = uint64_t(bits[lane]) << 32 | q.index[lane];
    best = key < best ? key : best;
  }
  return best;
}

// tokens[i], i < n, from the grid
static void nearest_in_grid(uint16_t* tokens, const uint8_t* pixels, int64_t n, const Grid& grid, const float* levels) {
  for (int64_t i = 0; i < n; ++i) {
    const int r = pixels[3 * i], g = pixels[3 * i + 1], b = pixels[3 * i + 2];
    const Quad& first = grid.cells[(r / kCellLevels * kSide + g / kCellLevels) * kSide + b / kCellLevels];
    const v4f x = levels[r] - v4f{}, y = levels[g] - v4f{}, z = levels[b] - v4f{};
    uint64_t best = best_of(first, x, y, z);
    for (int q = first.next, end = first.next + first.more; q < end; ++q) {
      const uint64_t key = best_of(grid.others[q], x, y, z);
      best = key < best ? key : best;
    }
    tokens[i] = uint16_t(best);
  }
}

// tokens[i], i < n, by every distance; lanes are pixels, two vectors of them at once.
template <class T>
static void nearest_of_all(uint16_t* tokens, const T* pixels, int64_t n, const float* palette, int K,
                           const float* levels) {
  constexpr int kStep = 2 * kLanes;
  for (int64_t i = 0; i < n; i += kStep) {
    float x[3][kStep] = {};
    int32_t index[kStep];
    const int count = int(std::min<int64_t>(kStep, n - i));
    for (int p = 0; p < count; ++p)
      for (int a = 0; a < 3; ++a) {
        const T value = pixels[3 * (i + p) + a];
        x[a][p] = std::is_same<T, uint8_t>::value ? levels[uint8_t(value)] : float(value);
      }
    vf best[2] = {splat(__builtin_inff()), splat(__builtin_inff())};
    vi at[2] = {};
    for (int j = 0; j < K; ++j)
      for (int v = 0; v < 2; ++v) {
        const vf d = distance(load(x[0] + v * kLanes) - palette[3 * j], load(x[1] + v * kLanes) - palette[3 * j + 1],
                              load(x[2] + v * kLanes) - palette[3 * j + 2]);
        const vi nearer = d < best[v];
        best[v] = nearer ? d : best[v];
        at[v] = nearer ? vi{} + j : at[v];
      }
    for (int v = 0; v < 2; ++v) store_i(index + v * kLanes, at[v]);
    for (int p = 0; p < count; ++p) tokens[i + p] = uint16_t(index[p]);
  }
}

// Whether N pixels repay the grid: what it spares a pixel grows with K - 20, what it costs is constant + K. The
// coefficients count distances of the plain loop, whose vectors of 8 and of 16 lanes are equally quick, and three times
// as quick as 4.
static bool grid_pays(int64_t N, int64_t K) {
  return N * (K - 20) > (kLanes == 4 ? 1 : 3) * (2500000 + 15000 * K);
}

// consume(tokens, begin, end, thread) once for every block of pixels; blocks of a chunk in order, chunks in any.
template <class T, class F>
static void for_each_block(const T* pixels, int64_t N, const View& palette, F&& consume) {
  const float* c = palette.as<float>();
  const int K = int(palette.size[0]);
  float levels[256];
  for (int u = 0; u < 256; ++u) levels[u] = float(u) / 127.5f - 1.f;
  Grid grid;
  if (std::is_same<T, uint8_t>::value && grid_pays(N, K)) {
    auto room = scratch<float>(Candidates::floats(K));
    Candidates all = Candidates::at(room.get(), K);
    bool small = true;
    for (int j = 0; j < K; ++j) {
      all.r[j] = c[3 * j], all.g[j] = c[3 * j + 1], all.b[j] = c[3 * j + 2], all.index[j] = j;
      for (int a = 0; a < 3; ++a) small &= std::fabs(c[3 * j + a]) <= kMaxCenter;
    }
    all.n = K;
    if (small) grid = build_grid(all, levels);
  }
  parallel_for((N + kChunk - 1) / kChunk, [&](int64_t chunk, int thread) {
    uint16_t tokens[kBlock];
    const int64_t stop = std::min(N, (chunk + 1) * kChunk);
    for (int64_t begin = chunk * kChunk; begin < stop; begin += kBlock) {
      const int64_t end = std::min(stop, begin + kBlock);
      const T* block = pixels + 3 * begin;
      if (grid.cells)  // then T is uint8_t
        nearest_in_grid(tokens, reinterpret_cast<const uint8_t*>(block), end - begin, grid, levels);
      else
        nearest_of_all(tokens, block, end - begin, c, K, levels);
      consume(tokens, begin, end, thread);
    }
  });
}

static void check_colors(const View& pixels, const View& palette) {
  IGPT_CHECK(pixels.dense() && pixels.cols() == 3, "palette: pixels must be dense [..., 3]");
  IGPT_CHECK(palette.dtype == DType::f32 && palette.dense() && palette.ndim == 2 && palette.cols() == 3 &&
                 palette.size[0] >= 1 && palette.size[0] <= kMaxColors,
             "palette: centres must be dense float32 [K, 3] with 1 <= K <= 4096");
}

static void palette_assign(View tokens, View pixels, View palette, View table, Stream) {
  check_colors(pixels, palette);
  IGPT_CHECK(!table, "palette_assign: the CPU makes its own table; give None");
  IGPT_CHECK(tokens.dense() && tokens.numel() == pixels.rows(), "palette_assign: tokens must be dense, one a pixel");
  const auto run = [&](const auto* in, auto* out) {
    for_each_block(in, pixels.rows(), palette, [&](const uint16_t* block, int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) out[i] = block[i - begin];
    });
  };
  const auto write = [&](auto* out) {
    if (pixels.dtype == DType::u8) return run(pixels.as<uint8_t>(), out);
    if (pixels.dtype == DType::f32) return run(pixels.as<float>(), out);
    refuse("palette_assign: pixels must be uint8 or float32");
  };
  if (tokens.dtype == DType::i64) return write(tokens.as<int64_t>());
  if (tokens.dtype == DType::i32) return write(tokens.as<int32_t>());
  if (tokens.dtype == DType::i16) return write(tokens.as<int16_t>());
  refuse("palette_assign: tokens must be int64, int32 or int16");
}

// What one thread has seen of one centre's colours: sums of w u by channel, of w, and of w |u|^2.
struct Moments {
  int64_t u[3], w, uu;
};

// sum of w |x - c|^2 over a centre's colours, from their moments: the scatter about their mean, in integers but for the
// last division, plus their weight times the squared distance from that mean to the centre. In levels, 0..255.
static double inertia_of(const Moments& m, const float* center) {
  if (m.w == 0) return 0;
  __int128 scatter = __int128(m.w) * m.uu;
  double moved = 0;
  for (int a = 0; a < 3; ++a) {
    scatter -= __int128(m.u[a]) * m.u[a];
    const double offset = 127.5 * (double(center[a]) + 1) - double(m.u[a]) / double(m.w);
    moved += offset * offset;
  }
  return (double(scatter) / double(m.w) + double(m.w) * moved) / (127.5 * 127.5);
}

static void kmeans_step(View sums, View counts, View squares, View inertia, View colors, View weights, View palette,
                        View table, Stream) {
  check_colors(colors, palette);
  IGPT_CHECK(!table, "kmeans_step: the CPU makes its own table; give None");
  const int64_t N = colors.rows(), K = palette.size[0], threads = max_threads();
  IGPT_CHECK(colors.dtype == DType::u8, "kmeans_step: colors must be uint8");
  IGPT_CHECK(weights.dtype == DType::i64 && weights.dense() && weights.numel() == N,
             "kmeans_step: weights must be int64 [N]");
  IGPT_CHECK(sums.dtype == DType::i64 && sums.dense() && sums.numel() == 3 * K,
             "kmeans_step: sums must be int64 [K, 3]");
  IGPT_CHECK(counts.dtype == DType::i64 && counts.dense() && counts.numel() == K,
             "kmeans_step: counts must be int64 [K]");
  IGPT_CHECK(squares.dtype == DType::i64 && squares.dense() && squares.numel() == K,
             "kmeans_step: squares must be int64 [K]");
  IGPT_CHECK(inertia.dtype == DType::f64 && inertia.numel() == 1, "kmeans_step: inertia must be one float64");
  auto moments = scratch<Moments>(threads * K);
  auto totals = scratch<int64_t>(threads * 8);  // a cache line each
  std::memset(moments.get(), 0, size_t(threads * K) * sizeof(Moments));
  std::memset(totals.get(), 0, size_t(threads) * 64);
  const uint8_t* u = colors.as<uint8_t>();
  const int64_t* w = weights.as<int64_t>();
  for_each_block(u, N, palette, [&](const uint16_t* block, int64_t begin, int64_t end, int thread) {
    Moments* mine = moments.get() + thread * K;
    int64_t total = totals[8 * thread];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = u[3 * i], g = u[3 * i + 1], b = u[3 * i + 2];
      // Past the limit the total stays, and nothing more is summed: no sum overflows before the call is refused.
      const bool fits = uint64_t(w[i]) <= uint64_t(kMaxWeight) && total <= kMaxWeight;
      total = fits ? total + w[i] : kMaxWeight + 1;
      const int64_t weight = total <= kMaxWeight ? w[i] : 0;
      Moments& m = mine[block[i - begin]];
      m.u[0] += weight * r, m.u[1] += weight * g, m.u[2] += weight * b;
      m.w += weight;
      m.uu += weight * (r * r + g * g + b * b);
    }
    totals[8 * thread] = total;
  });
  for (int64_t t = 1; t < threads; ++t) totals[0] += totals[8 * t];
  IGPT_CHECK(totals[0] <= kMaxWeight, "kmeans_step: weights must not be negative, and not exceed 2^45 in all");
  double sum = 0;
  for (int64_t j = 0; j < K; ++j) {
    Moments all = moments[j];
    for (int64_t t = 1; t < threads; ++t) {
      const Moments& m = moments[t * K + j];
      for (int a = 0; a < 3; ++a) all.u[a] += m.u[a];
      all.w += m.w, all.uu += m.uu;
    }
    for (int a = 0; a < 3; ++a) sums.as<int64_t>()[3 * j + a] = all.u[a];
    counts.as<int64_t>()[j] = all.w;
    squares.as<int64_t>()[j] = all.uu;
    sum += inertia_of(all, palette.as<float>() + 3 * j);
  }
  *inertia.as<double>() = sum;
}

// Whether this file was compiled as its first lines demand: products kept in memory cannot be fused away.
static bool rounds_every_operation() {
  for (int i = 1; i < 64; ++i) {
    volatile float x = 1.f / float(i), y = 3.f / float(i + 7), z = 0.7f / float(i + 1);
    volatile float xx = x * x, yy = y * y, zz = z * z, xy = xx + yy, d = xy + zz;
    const vf v = distance(splat(x), splat(y), splat(z));
    if (v[0] != d) return false;
  }
  return true;
}

void fill_palette(Ops& t) {
  if (!rounds_every_operation()) throw std::logic_error("csrc/cpu/palette.cpp needs -ffp-contract=off");
  t.palette_assign = palette_assign;
  t.kmeans_step = kmeans_step;
}

}  // namespace IGPT_ISA
}  // namespace igpt
