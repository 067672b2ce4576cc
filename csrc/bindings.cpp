// The only file that knows Python: casters that read tensors by their attributes, then one line per op.
//
// No torch header and no libtorch: a tensor is its data_ptr, shape, strides, dtype and device, asked for by name. So
// one build serves every torch version, and the package builds where torch is not installed.
#include <pybind11/pybind11.h>

#include <iterator>
#include <string_view>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using igpt::BlockMaskView;
using igpt::DType;
using igpt::LayersView;
using igpt::LayerView;
using igpt::MaskParts;
using igpt::MasksView;
using igpt::Stream;
using igpt::View;

namespace {

// As the list of a mask's tensors has them, see igpt_fast/patterns/tables.py.
constexpr View BlockMaskView::* kMaskViews[] = {
    &BlockMaskView::row_start, &BlockMaskView::row_tile, &BlockMaskView::row_mask,
    &BlockMaskView::col_start, &BlockMaskView::col_tile, &BlockMaskView::col_mask,
    &BlockMaskView::bits,      &BlockMaskView::bits_t,   &BlockMaskView::order};

// Attribute names and dtype objects, looked up once.
struct Names {
  static constexpr const char* kDtypes[] = {"float32", "float16", "bfloat16", "float64",      "int64",
                                            "int32",   "int16",   "uint8",    "float8_e4m3fn"};
  PyObject *data_ptr, *shape, *stride, *dtype, *is_cuda, *get_device, *is_contiguous, *is_neg;
  static constexpr int kCount = int(std::size(kDtypes));
  static_assert(kCount == int(DType::e4m3) + 1, "as enum DType has them");
  PyObject* dtypes[kCount];
  Names() {
    auto name = [](const char* s) { return PyUnicode_InternFromString(s); };
    data_ptr = name("data_ptr"), shape = name("shape"), stride = name("stride");
    dtype = name("dtype"), is_cuda = name("is_cuda"), get_device = name("get_device");
    is_contiguous = name("is_contiguous"), is_neg = name("is_neg");
    const py::module_ torch = py::module_::import("torch");
    for (int i = 0; i < kCount; ++i) dtypes[i] = py::object(torch.attr(kDtypes[i])).release().ptr();
  }
  static const Names& get() {
    static const Names& names = *new Names();  // never destroyed: Python may be gone before static destructors run
    return names;
  }
};

py::object call(PyObject* o, PyObject* method) {
  auto out = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(o, method));
  if (!out) throw py::error_already_set();
  return out;
}
py::object attribute(PyObject* o, PyObject* name) {
  auto out = py::reinterpret_steal<py::object>(PyObject_GetAttr(o, name));
  if (!out) throw py::error_already_set();
  return out;
}

View view_of(PyObject* o) {
  const Names& names = Names::get();
  View v;
  const py::object shape = attribute(o, names.shape), stride = call(o, names.stride), dtype = attribute(o, names.dtype);
  // Of more than four dimensions the first ones, which no op tells apart, are one.
  const int dims = int(PyTuple_GET_SIZE(shape.ptr())), folded = std::max(0, dims - 4);
  v.ndim = dims - folded;
  for (int i = 0; i < dims; ++i) {
    const int to = std::max(0, i - folded);
    const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    v.size[to] = i && !to ? v.size[0] * size : size;
    v.stride[to] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
  }
  if (folded && call(o, names.is_contiguous).ptr() != Py_True)
    throw py::value_error("expected a contiguous tensor, or one of at most 4 dimensions");
  if (call(o, names.is_neg).ptr() == Py_True) throw py::value_error("expected a tensor whose sign is resolved");
  int64_t count = 1;
  for (int i = 0; i < v.ndim; ++i) count *= v.size[i];
  if (count && v.cols() > 1 && v.stride[v.ndim - 1] != 1)
    throw py::value_error("expected a tensor whose last dimension is contiguous");
  int d = 0;
  while (d < Names::kCount && names.dtypes[d] != dtype.ptr()) ++d;
  if (d == Names::kCount) throw py::value_error("unsupported dtype " + std::string(py::str(dtype)));
  v.dtype = DType(d);
  if (attribute(o, names.is_cuda).ptr() == Py_True) v.device = int(PyLong_AsLong(call(o, names.get_device).ptr()));
  v.data = PyLong_AsVoidPtr(call(o, names.data_ptr).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!v.data && count) throw py::value_error("expected a tensor that has memory");  // null is for the absent
  return v;
}

// The weights of a model's blocks, read once. It keeps the tensors that it points into.
class Layers {
 public:
  explicit Layers(py::list layers) : owners_(layers) {
    constexpr size_t kFields = sizeof(LayerView) / sizeof(View);
    for (const py::handle layer : layers) {
      const auto fields = py::cast<py::tuple>(layer);
      if (fields.size() != kFields) throw py::value_error("expected the fields of LayerView for each layer");
      LayerView view;
      View* const views[] = {&view.ln_1, &view.qkv, &view.qkv_bias, &view.attn_proj, &view.attn_proj_bias,
                             &view.ln_2, &view.fc,  &view.fc_bias,  &view.mlp_proj,  &view.mlp_proj_bias};
      static_assert(sizeof views / sizeof *views == kFields);
      for (size_t i = 0; i < kFields; ++i)
        if (!fields[i].is_none()) *views[i] = view_of(py::object(fields[i]).ptr());
      views_.push_back(view);
    }
  }
  LayersView view() const { return {views_.data(), int64_t(views_.size())}; }

 private:
  py::list owners_;
  std::vector<LayerView> views_;
};

// The masks of a model's layers and heads, read once. It keeps the tensors that it points into.
class Masks {
 public:
  Masks(py::list masks, std::vector<int32_t> of, int64_t groups);
  MasksView view() const {
    return {views_.data(), int64_t(views_.size()), of_.data(), int64_t(of_.size()) / groups_, groups_};
  }

 private:
  py::list owners_;
  std::vector<BlockMaskView> views_;
  std::vector<int32_t> of_;
  int64_t groups_;
};

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<View> {
  PYBIND11_TYPE_CASTER(View, const_name("torch.Tensor | None"));
  bool load(handle h, bool) {
    if (!h.is_none()) value = view_of(h.ptr());
    return true;
  }
};

template <>
struct type_caster<BlockMaskView> {  // None, or the nine tensors of a BlockMask in the order of BlockMaskView
  PYBIND11_TYPE_CASTER(BlockMaskView, const_name("tuple | None"));
  bool load(handle h, bool) {
    if (h.is_none()) return true;
    if (!PyTuple_Check(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) != kFields) return false;
    value = fields(h.ptr(), 0);
    return true;
  }
  static constexpr int kFields = int(std::size(kMaskViews));
  static BlockMaskView fields(PyObject* tuple, Py_ssize_t first) {
    BlockMaskView mask;
    for (int i = 0; i < kFields; ++i) mask.*kMaskViews[i] = view_of(PyTuple_GET_ITEM(tuple, first + i));
    return mask;
  }
};

template <>
struct type_caster<MaskParts> {  // None, or the tensors of its parts one behind the other; the list lives as the caster
  PYBIND11_TYPE_CASTER(MaskParts, const_name("tuple | None"));
  bool load(handle h, bool) {
    using Mask = type_caster<BlockMaskView>;
    if (h.is_none()) return true;
    if (!PyTuple_Check(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) % Mask::kFields) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(h.ptr()); i += Mask::kFields)
      parts_.push_back(Mask::fields(h.ptr(), i));
    value = {parts_.data(), int64_t(parts_.size())};
    return true;
  }

 private:
  std::vector<BlockMaskView> parts_;
};

template <>
struct type_caster<LayersView> {
  PYBIND11_TYPE_CASTER(LayersView, const_name("Layers"));
  bool load(handle h, bool) {
    if (!py::isinstance<Layers>(h)) return false;
    value = py::cast<const Layers&>(h).view();
    return true;
  }
};

template <>
struct type_caster<MasksView> {
  PYBIND11_TYPE_CASTER(MasksView, const_name("Masks | None"));
  bool load(handle h, bool) {
    if (h.is_none()) return true;
    if (!py::isinstance<Masks>(h)) return false;
    value = py::cast<const Masks&>(h).view();
    return true;
  }
};

template <>
struct type_caster<Stream> {
  PYBIND11_TYPE_CASTER(Stream, const_name("int"));
  bool load(handle h, bool) {
    value.handle = PyLong_AsVoidPtr(h.ptr());
    return !PyErr_Occurred();
  }
};

}  // namespace pybind11::detail

namespace {

Masks::Masks(py::list masks, std::vector<int32_t> of, int64_t groups)
    : owners_(masks), of_(std::move(of)), groups_(groups) {
  for (const py::handle mask : masks) views_.push_back(py::cast<BlockMaskView>(mask));
  if (groups_ < 1 || of_.size() % size_t(groups_)) throw std::invalid_argument("expected so many groups in each layer");
}

struct Backend {
  const igpt::Ops* ops;
};

// All tensors of a call are on one device: a kernel would read the addresses of another as its own.
class OneDevice {
 public:
  explicit OneDevice(const char* op) : op_(op) {}
  void see(const View& v) {
    if (!v) return;
    if (first_ == kNone) first_ = v.device;
    if (v.device != first_)
      throw std::invalid_argument(std::string(op_) + ": tensors on " + name(first_) + " and " + name(v.device) +
                                  "; move them to one device");
  }
  void see(const BlockMaskView& m) {
    for (const auto view : kMaskViews) see(m.*view);
  }
  void see(const MaskParts& m) {
    for (int64_t i = 0; i < m.count; ++i) see(m.part[i]);
  }
  void see(const LayersView& l) {
    for (int64_t i = 0; i < l.count; ++i) see(l.layer[i].qkv);  // Python has seen that a layer's weights are together
  }
  void see(const MasksView& m) {
    for (int64_t i = 0; i < m.count; ++i) see(m.mask[i]);
  }
  template <class T>
  void see(const T&) {}

 private:
  static constexpr int kNone = -2;
  static std::string name(int device) { return device < 0 ? "cpu" : "cuda:" + std::to_string(device); }
  const char* op_;
  int first_ = kNone;
};

// Binds one field of Ops as a method. Kernels run without the interpreter lock.
template <class... A>
void op(py::class_<Backend>& cls, const char* name, void (*igpt::Ops::*field)(A...)) {
  cls.def(
      name,
      [name, field](const Backend& b, A... a) {
        if (!(b.ops->*field)) throw std::invalid_argument(std::string(b.ops->name) + " has no " + name);
        OneDevice device(name);
        (device.see(a), ...);
        (b.ops->*field)(a...);
      },
      py::call_guard<py::gil_scoped_release>());
}

struct Field {
  const char* name;
  bool (*in)(const igpt::Ops&);
};
#define IGPT_FIELD(field) {#field, [](const igpt::Ops& ops) { return ops.field != nullptr; }},
constexpr Field kFields[] = {IGPT_EACH_OP(IGPT_FIELD)};
#undef IGPT_FIELD

}  // namespace

// tests/simt builds this file a second time, under another name and with the CUDA sources on the bench.
#ifndef IGPT_MODULE
#define IGPT_MODULE _C
#endif
PYBIND11_MODULE(IGPT_MODULE, m) {
  m.doc() = "The compiled backends of igpt_fast. Import torch first: both share one OpenMP runtime.";
  py::class_<Layers>(m, "Layers", py::module_local()).def(py::init<py::list>());
  py::class_<Masks>(m, "Masks", py::module_local()).def(py::init([](py::list masks, py::list of, int64_t groups) {
    std::vector<int32_t> numbers;
    for (const py::handle n : of) numbers.push_back(py::cast<int32_t>(n));
    return Masks(masks, std::move(numbers), groups);
  }));
  py::class_<Backend> cls(m, "Backend", py::module_local());
#define IGPT_BIND(field) op(cls, #field, &igpt::Ops::field);
  IGPT_EACH_OP(IGPT_BIND)
#undef IGPT_BIND
  cls.def_property_readonly("name", [](const Backend& b) { return b.ops->name; });
  cls.def("has", [](const Backend& b, std::string_view name) {
    for (const Field& f : kFields)
      if (f.name == name) return f.in(*b.ops);
    return false;
  });
  cls.def_property_readonly_static("ops", [](const py::object&) {
    py::list names;
    for (const Field& f : kFields) names.append(f.name);
    return names;
  });

  m.def("backends", [] {  // best first
    py::list out;
    for (const char* isa : igpt::kCpuTables)
      if (auto ops = igpt::cpu_ops(isa)) out.append(Backend{ops});
    if (auto ops = igpt::cuda_ops()) out.append(Backend{ops});
    return out;
  });
  py::list tables;
  for (const char* isa : igpt::kCpuTables) tables.append(isa);
  m.attr("cpu_tables") = py::tuple(tables);
  m.def("cpu_why_not", &igpt::cpu_why_not,
        "Why this processor cannot run an instruction set's table; empty when it can.");
  m.def("cpu_is_wide_amd", &igpt::cpu_is_wide_amd,
        "Whether the processor is AMD's and twice as fast with AVX-512 as with AVX2.");
  m.def("cuda_why_not", &igpt::cuda_why_not,
        "Why there is no GPU to run the CUDA backend; empty when there is. To ask is to start CUDA.");
  m.def("cuda_takes_ptx", &igpt::cuda_takes_ptx, "Whether the driver is as new as the compiler of the kernels' PTX.");
  m.def("cuda_versions", &igpt::cuda_versions,
        "The CUDA runtime compiled in, and the newest that the driver runs; empty without CUDA.");
  m.def("cuda_archs", &igpt::cuda_archs, "The CUDA architectures compiled in; empty without CUDA.");
}
