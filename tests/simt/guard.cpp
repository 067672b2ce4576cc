// The bench's table of ops: the CUDA backend's launchers, each called on copies of its tensors that end at guard pages.
// What lies between a view's elements is poisoned, so a kernel that reads or writes beside its tensor is seen.
#include <cstring>
#include <vector>

#include "../../csrc/ops.h"
#include "runtime/runtime.h"

namespace igpt {

const Ops* cpu_ops(const std::string&) {
  return nullptr;
}
std::string cpu_why_not(const std::string&) {
  return "the bench has no CPU tables";
}
bool cpu_is_wide_amd() {
  return false;
}

}  // namespace igpt

namespace simt {
namespace {

using igpt::BlockMaskView;
using igpt::DType;
using igpt::LayersView;
using igpt::LayerView;
using igpt::MaskParts;
using igpt::MasksView;
using igpt::Ops;
using igpt::View;

size_t element_bytes(DType t) {
  constexpr size_t bytes[] = {4, 2, 2, 8, 8, 4, 2, 1, 1};
  return bytes[int(t)];
}

// Calls f(offset in bytes, bytes) for each row of a view.
template <class F>
void each_row(const View& v, F f) {
  const size_t e = element_bytes(v.dtype);
  if (v.numel() == 0) return;
  int64_t outer[3] = {1, 1, 1}, strides[3] = {0, 0, 0};
  for (int i = 0; i + 1 < v.ndim; ++i) outer[i] = v.size[i], strides[i] = v.stride[i];
  for (int64_t a = 0; a < outer[0]; ++a)
    for (int64_t b = 0; b < outer[1]; ++b)
      for (int64_t c = 0; c < outer[2]; ++c)
        f(size_t(a * strides[0] + b * strides[1] + c * strides[2]) * e, size_t(v.cols()) * e);
}

class Copies {
 public:
  ~Copies() {
    for (Copy& c : copies_) try {
        guarded_free(c.ours);
      } catch (const Error&) {  // the launch has failed already, or finish() has said so
      }
  }
  View guard(View v) {
    if (!v.data) return v;
    for (const Copy& c : copies_)  // one tensor given twice stays one tensor
      if (c.view.data == v.data && std::memcmp(c.view.size, v.size, sizeof v.size) == 0 &&
          std::memcmp(c.view.stride, v.stride, sizeof v.stride) == 0) {
        v.data = c.ours;
        return v;
      }
    size_t bytes = 0;
    each_row(v, [&](size_t at, size_t n) { bytes = std::max(bytes, at + n); });
    auto* ours = static_cast<char*>(guarded_alloc(bytes, uintptr_t(v.data) % 16));
    each_row(v, [&](size_t at, size_t n) { std::memcpy(ours + at, v.as<char>() + at, n); });
    copies_.push_back({v, ours});
    v.data = ours;
    return v;
  }
  BlockMaskView guard(BlockMaskView m) {
    for (View* v :
         {&m.row_start, &m.row_tile, &m.row_mask, &m.col_start, &m.col_tile, &m.col_mask, &m.bits, &m.bits_t, &m.order})
      *v = guard(*v);
    return m;
  }
  MaskParts guard(MaskParts m) {
    masks_.assign(m.part, m.part + m.count);
    for (BlockMaskView& y : masks_) y = guard(y);
    return {masks_.data(), m.count};
  }
  LayersView guard(LayersView l) {
    layers_.assign(l.layer, l.layer + l.count);
    for (LayerView& y : layers_)
      for (View* v : {&y.ln_1, &y.qkv, &y.qkv_bias, &y.attn_proj, &y.attn_proj_bias, &y.ln_2, &y.fc, &y.fc_bias,
                      &y.mlp_proj, &y.mlp_proj_bias})
        *v = guard(*v);
    return {layers_.data(), l.count};
  }
  MasksView guard(MasksView m) {
    masks_.assign(m.mask, m.mask + m.count);
    for (BlockMaskView& y : masks_) y = guard(y);
    m.mask = masks_.data();
    return m;
  }
  template <class T>
  T guard(T scalar) {
    return scalar;
  }
  void finish() {
    for (Copy& c : copies_)
      each_row(c.view, [&](size_t at, size_t n) { std::memcpy(c.view.as<char>() + at, c.ours + at, n); });
    while (!copies_.empty()) {
      void* ours = copies_.back().ours;
      copies_.pop_back();
      guarded_free(ours);
    }
  }

 private:
  struct Copy {
    View view;
    char* ours;
  };
  std::vector<Copy> copies_;
  std::vector<LayerView> layers_;
  std::vector<BlockMaskView> masks_;
};

const Ops* inner() {
  return igpt::cuda_ops();
}

template <auto Field, class... A>
void guarded(A... a) {
  Copies copies;
  (inner()->*Field)(copies.guard(a)...);
  copies.finish();
}

template <auto Field, class... A>
void wrap(Ops& t, void (*Ops::*)(A...)) {
  if (inner()->*Field) t.*Field = &guarded<Field, A...>;
}

}  // namespace
}  // namespace simt

namespace igpt {

const Ops* bench_ops() {
  static const Ops table = [] {
    Ops t;
    t.name = "simt";
#define IGPT_GUARD(field) simt::wrap<&Ops::field>(t, &Ops::field);
    IGPT_EACH_OP(IGPT_GUARD)
#undef IGPT_GUARD
    return t;
  }();
  return &table;
}

}  // namespace igpt
