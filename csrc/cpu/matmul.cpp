// matmul:  c = op(a) op(b) (+ bias)        the products of whole batches, forward and backward, in bf16
//
// op(a) [M, K]   op(b) [K, N]   c [M, N]   bias [N], each f32 or bf16; op is the matrix as it lies or its transpose.
// Floats are rounded to bf16 where they are packed, so that weights in f32 need no copy; sums are f32, of an element
// all in one order.
//
// A task is kPanel columns of op(b), packed into its thread's part of the L2 cache as pairs along K, times a range of
// rows of op(a): read where they lie if they are bf16 with K contiguous, else packed once for all tasks. A processor
// makes 32 products a cycle. For six rows and 64 columns it loads 10 vectors a pair of k, in 24 cycles: multiplying
// binds. What packing reads, 64 K elements a task, is less than one in a hundred loads from 192 rows on.
#include "../common/check.h"
#include "gemm.h"
#include "parallel.h"

namespace igpt {
namespace IGPT_ISA {

#if defined(__AVX512BF16__)
using E = Bf16Units;
using Unit = E::Unit;
constexpr int64_t kPanel = kNv * kLanes;    // columns a task
constexpr int64_t kLeastRows = 32 * kMr;    // a task, unless there are fewer
constexpr int64_t kTasks = 4;               // a thread at least, so that all end at about the same time

// A matrix as it lies in memory, zeros around it.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, cols, stride;
  explicit Matrix(const View& v) : data(v.as<T>()), rows(v.size[0]), cols(v.size[1]), stride(v.stride[0]) {}

  // kLanes pairs of neighbours in row r, from column c on.
  vf along_row(int64_t r, int64_t c) const {
    return reinterpret_cast<vf>(joined(part(r, c), part(r, c + kLanes)));
  }
  // Of each of kLanes columns from c on the pair in rows r and r + 1.
  vf along_columns(int64_t r, int64_t c) const {
    const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return reinterpret_cast<vf>(_mm512_permutexvar_epi16(in_turn, joined(part(r, c), part(r + 1, c))));
  }

 private:
  // kLanes elements of row r from column c on, in bf16.
  __m256i part(int64_t r, int64_t c) const {
    const int64_t n = r < rows ? std::max<int64_t>(0, std::min<int64_t>(kLanes, cols - c)) : 0;
    const __mmask16 there = __mmask16((1u << n) - 1);
    const T* p = data + r * stride + c;
    if constexpr (std::is_same_v<T, float>)
      return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, p)));
    else
      return _mm256_maskz_loadu_epi16(there, p);
  }
  static __m512i joined(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
};

// out [K / 2, kPanel]: columns n to n + kPanel - 1 of op(b), those up to `width` of them.
template <class T>
static void pack_panel(Unit* out, const View& b, bool transposed, int64_t n, int64_t width, int64_t pairs) {
  const Matrix<T> in(b);
  if (transposed)
    return transpose_units(out, kPanel, width, pairs, [&](int64_t r, int64_t k) { return in.along_row(n + r, 2 * k); });
  for (int64_t k = 0; k < pairs; ++k)
    for (int64_t c = 0; c < width; c += kLanes)
      store(reinterpret_cast<float*>(out + k * kPanel + c), in.along_columns(2 * k, n + c));
}

// Rows m to m + kPanel - 1 of op(a), as many of them as there are, into out [M, stride].
template <class T>
static void pack_rows(Unit* out, int64_t stride, const View& a, bool transposed, int64_t m, int64_t rows, int64_t pairs) {
  const Matrix<T> in(a);
  out += m * stride;
  if (transposed)
    return transpose_units(out, stride, pairs, rows, [&](int64_t k, int64_t r) { return in.along_columns(2 * k, m + r); });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < pairs; k += kLanes)
      store(reinterpret_cast<float*>(out + r * stride + k), in.along_row(m + r, 2 * k));
}

static inline void store_masked(float* p, __mmask16 there, vf v) {
  _mm512_mask_storeu_ps(p, there, reinterpret_cast<__m512>(v));
}
static inline void store_masked(bf16* p, __mmask16 there, vf v) {
  const auto rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  _mm256_mask_storeu_epi16(p, there, reinterpret_cast<__m256i>(rounded));
}

// Nothing here may call: the accumulators would live on the stack.
template <int MR, int NV, class T>
static inline void block(T* c, int64_t N, const Unit* a, int64_t lda, const Unit* b, int64_t K, const float* bias,
                         __mmask16 last) {
  vf acc[MR][NV];
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[i][j] = load(bias + j * kLanes);
  accumulate<E>(acc, a, lda, b, kPanel, K);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store_masked(c + i * N + j * kLanes, j + 1 < NV ? __mmask16(-1) : last, acc[i][j]);
}

// Rows [begin, end) of c, columns from c on.
template <int NV, class T>
static void rows_times_panel(T* c, int64_t N, const Unit* a, int64_t lda, int64_t begin, int64_t end, const Unit* b,
                             int64_t K, const float* bias, __mmask16 last) {
  int64_t m = begin;
  for (; m + kMr <= end; m += kMr) block<kMr, NV>(c + m * N, N, a + m * lda, lda, b, K, bias, last);
  for (; m < end; ++m) block<1, NV>(c + m * N, N, a + m * lda, lda, b, K, bias, last);
}

struct Rows {  // op(a) in units
  const Unit* data;
  int64_t stride;
};

template <class T>
static void run(const View& c, const Rows& a, const View& b, bool b_transposed, const float* bias, int64_t K) {
  const int64_t M = c.size[0], N = c.size[1], pairs = (K + 1) / 2, room = padded(pairs);
  const int64_t panels = (N + kPanel - 1) / kPanel, threads = max_threads();
  const int64_t ranges = std::max<int64_t>(1, std::min(M / kLeastRows, (kTasks * threads + panels - 1) / panels));
  const int64_t rows = ((M + ranges - 1) / ranges + kMr - 1) / kMr * kMr;
  const auto packed = scratch<Unit>(threads * room * kPanel);
  parallel_for(ranges * panels, [&](int64_t i, int thread) {
    const int64_t n = i % panels * kPanel, width = std::min(kPanel, N - n), lanes = padded(width);
    const int64_t begin = i / panels * rows, end = std::min(M, begin + rows);
    Unit* panel = packed.get() + thread * room * kPanel;
    // The transposition writes whole vectors of pairs: to the room's end.
    if (b.dtype == DType::f32)
      pack_panel<float>(panel, b, b_transposed, n, lanes, b_transposed ? room : pairs);
    else
      pack_panel<bf16>(panel, b, b_transposed, n, lanes, b_transposed ? room : pairs);
    const __mmask16 last = __mmask16(0xffffu >> (lanes - width));
    T* out = c.as<T>() + n;
    const auto go = [&](auto vectors) {
      rows_times_panel<vectors>(out, N, a.data, a.stride, begin, end, panel, pairs, bias + n, last);
    };
    switch (lanes / kLanes) {
      case 1:
        return go(std::integral_constant<int, 1>());
      case 2:
        return go(std::integral_constant<int, 2>());
      case 3:
        return go(std::integral_constant<int, 3>());
      default:
        return go(std::integral_constant<int, 4>());
    }
  });
}

static void matmul(View c, View a, View b, View bias, bool a_transposed, bool b_transposed, Stream) {
  IGPT_CHECK(a.ndim == 2 && b.ndim == 2 && c.ndim == 2, "matmul: matrices only");
  IGPT_CHECK(is_float(a.dtype) && is_float(b.dtype) && is_float(c.dtype), "matmul: float32 or bfloat16 only");
  const int64_t M = a.size[a_transposed], K = a.size[!a_transposed], N = b.size[!b_transposed];
  IGPT_CHECK(b.size[b_transposed] == K, "matmul: b must have as many rows as a has columns");
  IGPT_CHECK(c.size[0] == M && c.size[1] == N && c.dense(), "matmul: c must be [M, N], dense");
  IGPT_CHECK(!bias || (is_float(bias.dtype) && bias.dense() && bias.numel() == N), "matmul: bias must be [N]");
  if (M == 0 || N == 0) return;
  const auto added = scratch<float>(padded(N));
  std::fill_n(added.get(), padded(N), 0.f);
  if (bias) load_row(added.get(), bias.data, bias.dtype, N);

  Rows rows{a.as<Unit>(), a.stride[0] / 2};
  Scratch<Unit> packed;
  const bool in_units = a.stride[0] % 2 == 0 && K % 2 == 0 && reinterpret_cast<uintptr_t>(a.data) % sizeof(Unit) == 0;
  if (a.dtype == DType::f32 || a_transposed || !in_units) {
    const int64_t pairs = padded((K + 1) / 2), stride = pairs + kLanes;  // not a power of two: those share cache lines
    packed = scratch<Unit>(padded(M) * stride);
    parallel_for((M + kPanel - 1) / kPanel, [&](int64_t i, int) {
      const int64_t m = i * kPanel, n = padded(std::min(kPanel, M - m));
      if (a.dtype == DType::f32)
        pack_rows<float>(packed.get(), stride, a, a_transposed, m, n, pairs);
      else
        pack_rows<bf16>(packed.get(), stride, a, a_transposed, m, n, pairs);
    });
    rows = {packed.get(), stride};
  }
  if (c.dtype == DType::f32)
    run<float>(c, rows, b, b_transposed, added.get(), K);
  else
    run<bf16>(c, rows, b, b_transposed, added.get(), K);
}
#endif

// Without the instruction, and where there are better ones, torch's own product serves.
void fill_matmul([[maybe_unused]] Ops& t) {
#if defined(__AVX512BF16__)
  if (!cpu_multiplies_tiles()) t.matmul = matmul;
#endif
}

}  // namespace IGPT_ISA
}  // namespace igpt
