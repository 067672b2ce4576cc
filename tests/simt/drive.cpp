// The CUDA kernels without Python, for the sanitizers, on the bench or (compiled by nvcc) on a GPU.
//
//   drive FILE [OP]   the calls that simt/calls.py wrote, all or one op's, and without OP the test kernels: run again
//                     and again, on the bench under several schedules, they must give the same bits
//   drive race        a planted race, which the race check must see
//   drive wild        a planted read past a buffer
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <list>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../../csrc/ops.h"
#include "kernels/entry.h"
#include "world.h"

extern "C" void test_tile(const simt_test::Arguments&);
extern "C" void test_stages(const simt_test::Arguments&);
extern "C" void test_product(const simt_test::Arguments&);
extern "C" void test_ring(const simt_test::Arguments&);

namespace {

using igpt::BlockMaskView;
using igpt::DType;
using igpt::LayersView;
using igpt::MaskParts;
using igpt::MasksView;
using igpt::Ops;
using igpt::Stream;
using igpt::View;
using Bytes = std::vector<unsigned char>;

// Memory of the kernels' world, filled from the host, of exactly so many bytes.
class Buffer {
 public:
  explicit Buffer(const Bytes& content) : bytes_(content.size()), data_(world::allocate(content.size())) {
    world::copy_in(data_, content.data(), bytes_);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { world::release(data_); }
  void* data() const { return data_; }
  void append_to(Bytes& out) const {
    out.resize(out.size() + bytes_);
    world::copy_out(out.data() + out.size() - bytes_, data_, bytes_);
  }

 private:
  size_t bytes_;
  void* data_;
};

// ---- recorded calls ----

std::vector<char> content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no calls in " + path);
  std::vector<char> content(std::filesystem::file_size(path));  // some 300 MB: a byte at a time takes a minute
  if (!file.read(content.data(), std::streamsize(content.size()))) throw std::runtime_error("cannot read " + path);
  return content;
}

class Reader {
 public:
  explicit Reader(const std::vector<char>& content) : content_(content) {}
  bool skipping = false;  // the bytes of tensors, of a call that will not be made
  bool more() const { return at_ < content_.size(); }
  std::string name() {
    std::string s(raw<uint32_t>(), '\0');
    take(s.data(), s.size());
    return s;
  }
  template <class T>
  T argument() {
    if constexpr (std::is_same_v<T, View>) {
      return view();
    } else if constexpr (std::is_same_v<T, Stream>) {
      number();
      return {};
    } else if constexpr (std::is_same_v<T, BlockMaskView>) {
      const auto masks = several();
      return masks.empty() ? BlockMaskView() : masks.at(0);
    } else if constexpr (std::is_same_v<T, MaskParts>) {
      parts_.push_back(several());
      return {parts_.back().data(), int64_t(parts_.back().size())};
    } else if constexpr (std::is_same_v<T, LayersView> || std::is_same_v<T, MasksView>) {
      throw std::runtime_error("calls with layers are not recorded");
    } else {
      return T(number());
    }
  }
  std::vector<std::unique_ptr<Buffer>> buffers;  // of the calls since it was last cleared

 private:
  template <class T>
  T raw() {
    T x;
    take(&x, sizeof x);
    return x;
  }
  const char* skip(size_t bytes) {
    if (bytes > content_.size() - at_) throw std::runtime_error("the file of calls ends too early");
    at_ += bytes;
    return content_.data() + at_ - bytes;
  }
  void take(void* to, size_t bytes) {
    std::copy_n(skip(bytes), bytes, static_cast<char*>(to));  // also no bytes to nowhere
  }
  double number() {
    if (raw<char>() != 1) throw std::runtime_error("a number was expected");
    return raw<double>();
  }
  std::vector<BlockMaskView> several() {
    std::vector<BlockMaskView> masks;
    const char kind = raw<char>();
    if (kind == 0) return masks;
    if (kind != 3) throw std::runtime_error("the tensors of a mask were expected");
    for (uint64_t n = raw<uint64_t>() / 9; n; --n)
      masks.push_back({view(), view(), view(), view(), view(), view(), view(), view(), view()});
    return masks;
  }
  View view() {
    View v;
    const char kind = raw<char>();
    if (kind == 0) return v;
    if (kind != 2) throw std::runtime_error("a tensor was expected");
    v.dtype = DType(raw<uint8_t>()), v.ndim = raw<uint8_t>(), v.device = world::kDevice;
    for (int64_t& n : v.size) n = raw<int64_t>();
    for (int64_t& n : v.stride) n = raw<int64_t>();
    const uint64_t bytes = raw<uint64_t>();
    if (skipping) return skip(bytes), v;
    Bytes content(bytes);
    take(content.data(), content.size());
    if (content.empty()) return v;  // absent, as torch's empty tensors are
    buffers.push_back(std::make_unique<Buffer>(content));
    v.data = buffers.back()->data();
    return v;
  }
  std::list<std::vector<BlockMaskView>> parts_;  // what calls point into
  const std::vector<char>& content_;
  size_t at_ = 0;
};

// A call that can be repeated from the outputs as they were recorded.
struct Replay {
  std::function<void()> run;
  std::vector<std::unique_ptr<Buffer>> buffers;
};

template <class... A>
std::function<void()> bound(void (*launcher)(A...), Reader& reader) {
  std::tuple<A...> arguments{reader.argument<A>()...};  // in braces they are read in order
  if (!launcher) throw std::runtime_error("the CUDA backend lacks an op of the file");
  return [launcher, arguments] { std::apply(launcher, arguments); };
}

Replay next(Reader& reader, const std::string& name) {
  const Ops& ops = *igpt::cuda_ops();
  Replay call;
#define IGPT_CALL(field) \
  if (name == #field) call.run = bound(ops.field, reader);
  IGPT_EACH_OP(IGPT_CALL)
#undef IGPT_CALL
  if (!call.run) throw std::runtime_error("no op is named " + name);
  call.buffers = std::move(reader.buffers);
  reader.buffers.clear();
  return call;
}

Bytes bits(const std::vector<std::unique_ptr<Buffer>>& buffers) {
  world::synchronize();
  Bytes out;
  for (const auto& b : buffers) b->append_to(out);
  return out;
}

// ---- test kernels, on float buffers of the given sizes, of which the last is the output ----

// They hold random bits of small bfloat16 numbers, which as floats are numbers too.
Bytes kernel(void (*launcher)(const simt_test::Arguments&), const std::vector<int64_t>& sizes,
             const std::vector<int64_t>& numbers) {
  std::mt19937 random(2);
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<void*> pointers;
  for (int64_t n : sizes) {
    Bytes content(size_t(4 * n));
    for (size_t i = 0; i < content.size(); i += 2) content[i] = uint8_t(random()), content[i + 1] = 0x3f;
    buffers.push_back(std::make_unique<Buffer>(content));
    pointers.push_back(buffers.back()->data());
  }
  launcher({pointers.data(), numbers.data()});
  return bits(buffers);
}

// Every run of `result` must give the same bits, whatever the schedule.
bool agrees(const std::string& name, const std::function<Bytes()>& result) {
  Bytes first;
  for (int i = 0; i < world::kRuns; ++i) {
    world::schedule(i);
    const Bytes now = result();
    if (i == 0) first = now;
    if (now != first) {
      std::printf("%s: run %d gives other bits\n", name.c_str(), i);
      return false;
    }
  }
  std::printf("%s: the same bits in %d runs\n", name.c_str(), world::kRuns);
  return true;
}

int replay(const char* path, const std::string& only) {
  bool good = true;
  int calls = 0;
  const std::vector<char> content = content_of(path);
  std::vector<std::unique_ptr<Reader>> runs;  // one each, so that every run starts from the same bytes
  for (int i = 0; i < world::kKinds * world::kRuns; ++i) runs.push_back(std::make_unique<Reader>(content));
  while (runs[0]->more()) {
    std::vector<Replay> call;
    std::string name;
    bool wanted = true;
    for (auto& reader : runs) {
      name = reader->name();
      wanted = only.empty() || name == only;
      reader->skipping = !wanted;
      call.push_back(next(*reader, name));
    }
    if (!wanted) continue;
    size_t i = 0;
    for (int kind = 0; kind < world::kKinds; ++kind) {
      world::kind(kind);
      good = agrees(name, [&] { return call[i].run(), bits(call[i++].buffers); }) && good;
    }
    ++calls;
  }
  if (!calls) throw std::runtime_error("the file has no call of " + only);
  if (!only.empty()) return good ? 0 : 1;
  good = agrees("tile", [] { return kernel(test_tile, {512, 512}, {512, 0}); }) && good;
  good = agrees("stages", [] { return kernel(test_stages, {1500, 1500}, {1500, 0}); }) && good;
#if !defined(DRIVE_NO_SM90)
  good = agrees("product", [] { return kernel(test_product, {64 * 132, 64 * 132, 4096}, {264, 0}); }) && good;
  good = agrees("ring", [] { return kernel(test_ring, {512, 512}, {8, 4, 0}); }) && good;
#endif
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string first = argc > 1 ? argv[1] : "";
  try {
    if (first == "race")
      return kernel(test_tile, {256, 256}, {256, 1}), 0;  // no __syncthreads between writers and readers
    if (first == "wild") return kernel(test_tile, {256, 256}, {256, 3}), 0;  // reads one element past the input
    return replay(argv[1], argc > 2 ? argv[2] : "");
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 2;
  }
}
