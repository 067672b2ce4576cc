// palette_decode:   pixels[i] = colors[tokens[i]]    tokens i64, i32 or i16 [N]   colors u8 [K, 3]   pixels u8 [N, 3]
// color_histogram:  counts[r << 16 | g << 8 | b] += 1 for every pixel             counts i64 [2^24]
//
// Decoding reads 2 to 8 bytes a pixel and writes 3: each store is a word of which the next pixel overwrites the fourth
// byte. The first bad token is found by index, so that threads change nothing. The histogram is bound by the latency of
// 128 MB that no cache holds; runs of one colour become one addition, and additions of whole numbers have no order.
#include <cstring>

#include "../common/palette.h"
#include "parallel.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int64_t kGrain = 1 << 15;  // pixels a task
constexpr int64_t kMaxColors = 4096;

template <class Token>
static int64_t decode(uint8_t* pixels, const Token* tokens, int64_t N, const uint8_t* colors, int64_t K) {
  uint32_t words[kMaxColors] = {};
  for (int64_t j = 0; j < K; ++j) std::memcpy(&words[j], colors + 3 * j, 3);
  auto first = scratch<int64_t>((N + kGrain - 1) / kGrain);
  parallel_chunks(N, kGrain, [&](int64_t begin, int64_t end, int64_t chunk) {
    int64_t bad = -1;
    for (int64_t i = begin; i < end; ++i) {
      const bool good = uint64_t(int64_t(tokens[i])) < uint64_t(K);
      if (!good && bad < 0) bad = i;
      const uint32_t word = words[good ? int64_t(tokens[i]) : 0];
      std::memcpy(pixels + 3 * i, &word, i + 1 < end ? 4 : 3);  // the next chunk's bytes belong to another thread
    }
    first[chunk] = bad;
  });
  for (int64_t c = 0; c < (N + kGrain - 1) / kGrain; ++c)
    if (first[c] >= 0) return first[c];
  return -1;
}

static void palette_decode(View pixels, View bad, View tokens, View colors, Stream) {
  const int64_t N = tokens.numel(), K = colors.rows();
  check_decode(pixels, bad, tokens, colors);
  const auto run = [&](const auto* in) {
    *bad.as<int64_t>() = decode(pixels.as<uint8_t>(), in, N, colors.as<uint8_t>(), K);
  };
  if (tokens.dtype == DType::i64) return run(tokens.as<int64_t>());
  if (tokens.dtype == DType::i32) return run(tokens.as<int32_t>());
  if (tokens.dtype == DType::i16) return run(tokens.as<int16_t>());
  refuse("palette_decode: tokens must be int64, int32 or int16");
}

static void color_histogram(View counts, View pixels, View, Stream) {
  check_histogram(counts, pixels);
  const uint8_t* u = pixels.as<uint8_t>();
  int64_t* n = counts.as<int64_t>();
  parallel_chunks(pixels.rows(), kGrain, [&](int64_t begin, int64_t end, int64_t) {
    const auto color_at = [=](int64_t i) { return u[3 * i] << 16 | u[3 * i + 1] << 8 | u[3 * i + 2]; };
    int last = color_at(begin);
    int64_t run = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int color = color_at(i);
      if (color != last) {
        __atomic_fetch_add(n + last, run, __ATOMIC_RELAXED);
        last = color, run = 0;
      }
      ++run;
    }
    __atomic_fetch_add(n + last, run, __ATOMIC_RELAXED);
  });
}

void fill_palette_decode(Ops& t) {
  t.palette_decode = palette_decode;
  t.color_histogram = color_histogram;
}

}  // namespace IGPT_ISA
}  // namespace igpt
