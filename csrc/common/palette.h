// What palette_decode and color_histogram refuse, on every backend.
#pragma once
#include "check.h"

namespace igpt {

static inline void check_decode(const View& pixels, const View& bad, const View& tokens, const View& colors) {
  const int64_t N = tokens.numel(), K = colors.rows();
  IGPT_CHECK(tokens.dense(), "palette_decode: tokens must be dense");
  IGPT_CHECK(pixels.dtype == DType::u8 && pixels.dense() && pixels.numel() == 3 * N,
             "palette_decode: pixels must be dense uint8, three a token");
  IGPT_CHECK(colors.dtype == DType::u8 && colors.dense() && colors.cols() == 3 && K >= 1 && K <= 4096,
             "palette_decode: colors must be dense uint8 [K, 3] with 1 <= K <= 4096");
  IGPT_CHECK(bad.dtype == DType::i64 && bad.numel() == 1, "palette_decode: bad must be one int64");
}

static inline void check_histogram(const View& counts, const View& pixels) {
  IGPT_CHECK(pixels.dtype == DType::u8 && pixels.dense() && pixels.cols() == 3,
             "color_histogram: pixels must be dense uint8 [N, 3]");
  IGPT_CHECK(counts.dtype == DType::i64 && counts.dense() && counts.numel() == 1 << 24,
             "color_histogram: counts must be dense int64 [2^24]");
}

}  // namespace igpt
