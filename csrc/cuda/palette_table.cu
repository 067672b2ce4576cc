// palette_table: the tokens of all 2^24 colours, in the order of table_index (palette.cuh)
//
// table [boxes, 4096] i16: boxes first, first + 1, ... of 16^3 colours   palette [K, 3] f32, K <= 4096
//
// A block has a box, a warp one of its eight cells of 8^3 colours. The block lists the centres that may be nearest to
// some colour of the box, the warp those of the list that may be nearest to one of its cell (outdone(), as on the CPU),
// in increasing order both, so that the lowest wins a tie. A lane then has 16 colours, 2 x 2 x 4 levels, which share
// their differences: 84 operations a candidate. Distances are rounded as in palette_assign's plain loop, and what the
// lists leave out cannot win: the same tokens to the bit.
//
// Levels are divided once a block, and a warp's lanes hand each other the centres that they compare.
//
// Operations, K = 512, lists of some 40 and 5 centres: 20 K a box (2^12) for the block's list, 20 * 40 a cell (2^15)
// for the warp's, 84 * 5 for 16 colours (2^20): 5 * 10^8 in all, 20 us at 28 T/s; the 33.5 MB written take 8 us and
// stay in L2. A cell whose list would be longer than kMost goes by the box's: K centres in one cell cost K distances.
#include "palette.cuh"

namespace igpt {
namespace cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBoxes = 4096, kBoxColors = 4096, kBoxLevels = 16, kCellLevels = 8, kCellColors = 512;
constexpr int kMost = 128;       // candidates of a cell
constexpr float kSlack = 1e-5f;  // relative; float32 distances err by less than 1e-6
constexpr uint32_t kAll = 0xffffffffu;

struct Region {  // all colours x with |x - middle| <= half, a little more for the rounding of both
  float4 middle, half;
};

__device__ inline Region region(const float* levels, int r, int g, int b, int side) {
  const auto middle = [=](int u) { return 0.5f * (levels[u] + levels[u + side - 1]); };
  const auto half = [=](int u) { return 0.5f * (levels[u + side - 1] - levels[u]) + 1e-6f; };
  return {make_float4(middle(r), middle(g), middle(b), 0.f), make_float4(half(r), half(g), half(b), 0.f)};
}

__device__ inline float from_middle(const Region& x, const float4& c) {
  return distance(x.middle.x, x.middle.y, x.middle.z, c);
}

// Whether `rival` is nearer than c throughout the region. The difference of their squared distances is linear in x: its
// least value is the one in the middle minus 2 sum_a half_a |c - rival|_a. What float32 may make of it, here and for
// the pixels, is less than the slack. What is not a number outdoes nothing and is not outdone.
__device__ inline bool outdone(const Region& x, const float4& c, float near, const float4& rival, float rivals) {
  const float reach =
      2.f * (x.half.x * fabsf(c.x - rival.x) + x.half.y * fabsf(c.y - rival.y) + x.half.z * fabsf(c.z - rival.z));
  const float span = x.half.x * x.half.x + x.half.y * x.half.y + x.half.z * x.half.z;
  return near - rivals - reach > kSlack * (near + rivals + reach + span);
}

// The least distance and its centre as one number: distances are not negative, so their bits order as they do.
__device__ inline uint64_t key_of(float near, int j) {
  return uint64_t(__float_as_uint(near == near ? near : INFINITY)) << 32 | uint32_t(j);
}

__device__ inline uint64_t warp_least(uint64_t key) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kAll, key, offset);
    key = other < key ? other : key;
  }
  return key;
}

// list = the centres that the one nearest to the middle does not outdo; returns how many. For the whole block.
__device__ inline int list_of_box(uint16_t* list, uint64_t* keys, int* counts, const Region& box, const float* palette,
                                  int K) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t least = ~uint64_t(0);
  for (int j = threadIdx.x; j < K; j += kThreads) {
    const uint64_t key = key_of(from_middle(box, center_of(palette, j)), j);
    least = key < least ? key : least;
  }
  least = warp_least(least);
  if (lane == 0) keys[warp] = least;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) least = keys[w] < least ? keys[w] : least;
  const float4 rival = center_of(palette, int(uint32_t(least)));
  const float rivals = from_middle(box, rival);
  int n = 0;
  for (int begin = 0; begin < K; begin += kThreads) {
    const int j = begin + int(threadIdx.x);
    const float4 c = center_of(palette, j < K ? j : 0);
    const bool keep = j < K && !outdone(box, c, from_middle(box, c), rival, rivals);
    const uint32_t kept = __ballot_sync(kAll, keep);
    if (lane == 0) counts[warp] = __popc(kept);
    __syncthreads();
    int at = n + __popc(kept & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      at += w < warp ? counts[w] : 0;
      n += counts[w];
    }
    if (keep) list[at] = uint16_t(j);
    __syncthreads();  // counts have been read, the list is whole
  }
  return n;
}

// The same for a warp and its cell, from the box's list; then, of at most 32, all are each other's rivals: being
// outdone is transitive, so one that is itself outdone still counts. Returns kMost + 1 where there are more.
__device__ inline int list_of_cell(uint16_t* list, const Region& cell, const uint16_t* from, int count,
                                   const float* palette) {
  const int lane = threadIdx.x % 32;
  uint64_t least = ~uint64_t(0);
  for (int i = lane; i < count; i += 32) {
    const uint64_t key = key_of(from_middle(cell, center_of(palette, from[i])), from[i]);
    least = key < least ? key : least;
  }
  const float4 rival = center_of(palette, int(uint32_t(warp_least(least))));
  const float rivals = from_middle(cell, rival);
  const auto append = [&](int n, bool keep, uint16_t j) {
    const uint32_t kept = __ballot_sync(kAll, keep);
    const int at = n + __popc(kept & ((1u << lane) - 1));
    if (keep && at < kMost) list[at] = j;
    return n + __popc(kept);
  };
  int n = 0;
  for (int begin = 0; begin < count; begin += 32) {
    const int j = from[begin + lane < count ? begin + lane : 0];
    const float4 c = center_of(palette, j);
    n = append(n, begin + lane < count && !outdone(cell, c, from_middle(cell, c), rival, rivals), uint16_t(j));
  }
  __syncwarp();
  if (n > 32) return n <= kMost ? n : kMost + 1;
  const int j = list[lane < n ? lane : 0];
  const float4 c = center_of(palette, j);
  const float near = from_middle(cell, c);
  bool keep = lane < n;
  for (int i = 0; i < n; ++i) {
    const float4 other =
        make_float4(__shfl_sync(kAll, c.x, i), __shfl_sync(kAll, c.y, i), __shfl_sync(kAll, c.z, i), 0.f);
    const float others = __shfl_sync(kAll, near, i);
    keep = keep && !outdone(cell, c, near, other, others);
  }
  __syncwarp();  // the list has been read
  n = append(0, keep, uint16_t(j));
  __syncwarp();
  return n;
}

// The tokens of 2 x 2 x 4 levels from (r, g, b), which are neighbours in the table.
__device__ inline void nearest16(uint16_t* out, int r, int g, int b, const uint16_t* list, int count,
                                 const float* palette, const float* levels) {
  float best[16];
  uint32_t token[16];
#pragma unroll
  for (int k = 0; k < 16; ++k) best[k] = INFINITY, token[k] = 0;
  float x[2], y[2], z[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    z[k] = levels[b + k];
    if (k < 2) x[k] = levels[r + k], y[k] = levels[g + k];
  }
  for (int i = 0; i < count; ++i) {
    const int j = list[i];
    const float4 c = center_of(palette, j);
    float blue[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) blue[k] = __fmul_rn(__fsub_rn(z[k], c.z), __fsub_rn(z[k], c.z));
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float dr = __fsub_rn(x[k / 8], c.x), dg = __fsub_rn(y[k / 4 % 2], c.y);
      const float d = __fadd_rn(__fadd_rn(__fmul_rn(dr, dr), __fmul_rn(dg, dg)), blue[k % 4]);
      if (d < best[k]) best[k] = d, token[k] = j;
    }
  }
  uint4* to = reinterpret_cast<uint4*>(out);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const uint32_t* t = token + 8 * v;
    to[v] = make_uint4(t[0] | t[1] << 16, t[2] | t[3] << 16, t[4] | t[5] << 16, t[6] | t[7] << 16);
  }
}

__global__ void __launch_bounds__(kThreads) palette_table_kernel(uint16_t* table,       // [boxes, 4096]
                                                                 const float* palette,  // [K, 3]
                                                                 int K, int first) {
  STATIC_SMEM(uint16_t, of_box, kMaxColors);
  STATIC_SMEM(uint16_t, of_cells, kWarps* kMost);
  STATIC_SMEM(uint64_t, keys, kWarps);
  STATIC_SMEM(int, counts, kWarps);
  STATIC_SMEM(float, levels, 256);  // divisions are many operations
  static_assert(kThreads == 256);
  levels[threadIdx.x] = level(int(threadIdx.x));
  __syncthreads();
  const int box = first + int(blockIdx.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int r = box / 256 * kBoxLevels, g = box / 16 % 16 * kBoxLevels, b = box % 16 * kBoxLevels;
  const int in_box = list_of_box(of_box, keys, counts, region(levels, r, g, b, kBoxLevels), palette, K);

  r += warp / 4 * kCellLevels, g += warp / 2 % 2 * kCellLevels, b += warp % 2 * kCellLevels;
  uint16_t* list = of_cells + warp * kMost;
  const int in_cell = list_of_cell(list, region(levels, r, g, b, kCellLevels), of_box, in_box, palette);

  r += lane / 16 * 4 + lane / 2 % 2 * 2, g += lane / 8 % 2 * 4 + lane % 2 * 2, b += lane / 4 % 2 * 4;
  uint16_t* out = table + int64_t(blockIdx.x) * kBoxColors + warp * kCellColors + lane * 16;
  const bool own = in_cell <= kMost;
  nearest16(out, r, g, b, own ? list : of_box, own ? in_cell : in_box, palette, levels);
}

// ---- launcher ----

static void palette_table(View table, View palette, int64_t first, Stream stream) {
  check_palette(palette);
  IGPT_CHECK(table.dtype == DType::i16 && table.dense() && table.ndim == 2 && table.cols() == kBoxColors &&
                 starts_at_sixteen(table),
             "palette_table: the table must be dense int16 [boxes, 4096] at a multiple of 16 bytes");
  const int64_t boxes = table.size[0];
  IGPT_CHECK(first >= 0 && first + boxes <= kBoxes, "palette_table: boxes %lld to %lld are not among 0 to 4095",
             (long long)first, (long long)(first + boxes - 1));
  if (boxes == 0) return;
  const OnDevice device(palette);
  LAUNCH(palette_table_kernel, unsigned(boxes), kThreads, 0, stream, table.as<uint16_t>(), palette.as<float>(),
         int(palette.size[0]), int(first));
}

void fill_palette_table(Ops& t) {
  t.palette_table = palette_table;
}

}  // namespace cuda
}  // namespace igpt
