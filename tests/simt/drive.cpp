// The CUDA kernels on the bench without Python, for the sanitizers: every op that the driver knows runs on small shapes
// under several schedules, which must agree to the bit. `drive race` plants a race that the thread sanitizer must see.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/ops.h"
#include "cuda_runtime.h"
#include "kernels/entry.h"
#include "runtime.h"

extern "C" void test_tile(const simt_test::Arguments&);
extern "C" void test_stages(const simt_test::Arguments&);
extern "C" void test_product(const simt_test::Arguments&);
extern "C" void test_ring(const simt_test::Arguments&);

namespace {

using igpt::DType;
using igpt::View;

// A guarded tensor [rows, cols] of floats (or one row when rows is 0).
struct Tensor {
  View view;
  size_t bytes;
  Tensor(int64_t rows, int64_t cols, std::mt19937* random = nullptr) {
    view.ndim = rows ? 2 : 1;
    view.size[0] = rows ? rows : cols, view.stride[0] = rows ? cols : 1;
    if (rows) view.size[1] = cols, view.stride[1] = 1;
    bytes = size_t(view.numel()) * sizeof(float);
    view.data = simt::guarded_alloc(bytes, 0);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; random && i < view.numel(); ++i) view.as<float>()[i] = normal(*random);
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { simt::guarded_free(view.data); }
};

struct Bits {
  std::vector<unsigned char> bytes;
  void add(const Tensor& t) {
    const auto* p = t.view.as<unsigned char>();
    bytes.insert(bytes.end(), p, p + t.bytes);
  }
};

Bits norm(int64_t rows, int64_t cols) {
  std::mt19937 random(1);
  Tensor x(rows, cols, &random), r(rows, cols, &random), w(0, cols, &random), dy(rows, cols, &random);
  Tensor y(rows, cols), sum(rows, cols), rstd(0, rows), dx(rows, cols), dweight(2, cols);
  const igpt::Ops& ops = *igpt::cuda_ops();
  ops.rms_norm_fwd(y.view, sum.view, rstd.view, x.view, r.view, w.view, 1e-5f, {});
  ops.rms_norm_bwd(dx.view, {}, dweight.view, dy.view, {}, sum.view, w.view, rstd.view, {});
  Bits out;
  for (const Tensor* t : {&y, &sum, &rstd, &dx, &dweight}) out.add(*t);
  return out;
}

// The head in bf16, by the kernels for a GPU of this compute capability.
Bits head(int64_t rows, int64_t cols, int64_t colors, int capability) {
  std::mt19937 random(3);
  const int64_t width = (colors + 7) / 8 * 8;
  Tensor x(0, rows * cols / 2), w(0, colors * cols / 2), d(0, rows * width / 2), targets(0, 2 * rows);
  Tensor loss(0, rows), lse(0, rows), dloss(0, rows, &random);
  const auto matrix = [](const Tensor& t, int64_t n, int64_t c) {
    View v = t.view;
    v.dtype = DType::bf16, v.ndim = 2, v.size[0] = n, v.size[1] = c, v.stride[0] = c, v.stride[1] = 1;
    return v;
  };
  const View hidden = matrix(x, rows, cols), weight = matrix(w, colors, cols);
  for (const View& v : {hidden, weight})
    for (int64_t i = 0; i < v.numel(); ++i) v.as<uint16_t>()[i] = uint16_t(0x3c00 + random() % 256);
  View target = targets.view;
  target.dtype = DType::i64, target.size[0] = rows;
  for (int64_t i = 0; i < rows; ++i) target.as<int64_t>()[i] = i % colors;
  simt::capability = capability;
  const igpt::Ops& ops = *igpt::cuda_ops();
  ops.linear_cross_entropy_fwd(loss.view, lse.view, hidden, weight, target, {});
  ops.linear_cross_entropy_dlogits(matrix(d, rows, width), dloss.view, hidden, weight, target, lse.view, {});
  Bits out;
  for (const Tensor* t : {&loss, &lse, &d}) out.add(*t);
  return out;
}

// A test kernel on float buffers of the given sizes, filled with random bits of small bfloat16 numbers (as floats they
// are numbers too), of which the last is its output.
Bits kernel(void (*launcher)(const simt_test::Arguments&), const std::vector<int64_t>& sizes,
            const std::vector<int64_t>& numbers) {
  std::mt19937 random(2);
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::vector<void*> buffers;
  for (int64_t n : sizes) {
    tensors.push_back(std::make_unique<Tensor>(0, n));
    auto* halves = tensors.back()->view.as<uint16_t>();
    for (int64_t i = 0; i < 2 * n; ++i) halves[i] = uint16_t(0x3f00 + random() % 256);
    buffers.push_back(tensors.back()->view.data);
  }
  launcher({buffers.data(), numbers.data()});
  Bits bits;
  bits.add(*tensors.back());
  return bits;
}

template <class F>
bool agrees(const char* name, F run) {
  const simt::Config schedules[] = {{simt::kInOrder, 1, simt::kLate, 1},
                                    {simt::kRandom, 5, simt::kLate, 1},
                                    {simt::kRandom, 6, simt::kAtOnce, 2},
                                    {simt::kReverse, 1, simt::kLate, 1}};
  Bits first;
  for (const simt::Config& c : schedules) {
    simt::config() = c;
    const Bits bits = run();
    if (first.bytes.empty()) first = bits;
    if (bits.bytes != first.bytes) {
      std::printf("%s: schedule %d, seed %d gives other bits\n", name, c.schedule, int(c.seed));
      return false;
    }
  }
  std::printf("%s: the same bits under %zu schedules\n", name, std::size(schedules));
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const bool race = argc > 1 && std::strcmp(argv[1], "race") == 0;
  try {
    if (race) {
      kernel(test_tile, {256, 256}, {256, 1});  // no __syncthreads between the writers and the readers of shared memory
      return 0;
    }
    bool good = agrees("rms_norm [3, 64]", [] { return norm(3, 64); });
    good = agrees("rms_norm [2, 33]", [] { return norm(2, 33); }) && good;
    good = agrees("linear_cross_entropy [130, 328, 300]", [] { return head(130, 328, 300, 8); }) && good;
    good = agrees("linear_cross_entropy_sm90 [130, 328, 300]", [] { return head(130, 328, 300, 9); }) && good;
    good = agrees("tile", [] { return kernel(test_tile, {512, 512}, {512, 0}); }) && good;
    good = agrees("stages", [] { return kernel(test_stages, {1500, 1500}, {1500, 0}); }) && good;
    good = agrees("product", [] { return kernel(test_product, {64 * 132, 64 * 132, 4096}, {264, 0}); }) && good;
    good = agrees("ring", [] { return kernel(test_ring, {512, 512}, {8, 4, 0}); }) && good;
    return good ? 0 : 1;
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 2;
  }
}
