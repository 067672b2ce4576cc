// dropout:  y = x / (1 - p) where an element is kept, else 0        forward and, for gradients, backward
//
// x, y [..., C] f32 or bf16, dense. An element's place is its index: the high bits of it stand for attention's query,
// the low ones for the key. About ten instructions a vector: memory binds, 2 reads and 2 writes a bf16 element in all.
#include "dropout.h"

#include <algorithm>

#include "parallel.h"

namespace igpt {
namespace IGPT_ISA {

constexpr int64_t kRun = 1 << 16;  // elements that share a query

template <class T>
static void run(const View& y, const View& x, const Dropout& dropout) {
  parallel_chunks(x.numel(), kRun, [&](int64_t begin, int64_t end, int64_t chunk) {
    uint32_t low, high;
    dropout.queries(&low, &high, 0, chunk, 1);
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, end - i);
      const vf weights = dropout.weights(vu{} + low, vu{} + high, counted(uint32_t(i - begin)));
      store_upto(y.as<T>() + i, load_upto(x.as<T>() + i, n) * weights, n);
    }
  });
}

static void dropout(View y, View x, float p, int64_t seed, Stream) {
  IGPT_CHECK(is_float(x.dtype) && y.dtype == x.dtype, "dropout: float32 or bfloat16 only, y as x");
  IGPT_CHECK(same_shape(x, y) && x.dense() && y.dense(), "dropout: y must be shaped like x, both dense");
  const Dropout which(p, seed);
  by_dtype([&](auto like) { run<decltype(like)>(y, x, which); }, x.dtype);
}

void fill_dropout(Ops& t) {
  t.dropout = dropout;
}

}  // namespace IGPT_ISA
}  // namespace igpt
