// Tensors of rms_norm, of a dtype known to the compiler or only at the launch, and the choice between the two.
#pragma once
#include <utility>

#include "device.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace igpt {
namespace cuda {

struct Typed {
  void* data;
  DType dtype;
};

struct Any {};

template <class T>
struct Matrix {
  using Element = T;
  T* data;

  explicit Matrix(const View& v) : data(v.as<T>()) {}
  template <int V>
  __device__ Bits<T, V> fetch(int64_t i, bool given) const {
    return load_once<T, V>(data, i, given);
  }
  template <int V>
  __device__ void store(int64_t i, const Floats<V>& x) const {
    store_as<T, V>(data, i, x);
  }
  template <int V>
  __device__ void put(int64_t i, Bits<T, V> bits) const {
    store_bits<T, V>(data, i, bits);
  }
  template <int V>
  __device__ Bits<T, V> rounded(const Floats<V>& x) const {
    return bits_of<T, V>(x);
  }
  template <int V>
  __device__ void stage(Bits<T, V>* to, int64_t i) const {
    ptx::cp_async<sizeof(T) * V>(ptx::smem_u32(to), data + i);
  }
};

template <>
struct Matrix<Any> {
  using Element = float;
  void* data;
  DType dtype;

  explicit Matrix(const View& v) : data(v.data), dtype(v.dtype) {}
  template <int V>
  __device__ Bits<float, V> fetch(int64_t i, bool given) const {
    return bits_of<float, V>(given ? load<V>(data, dtype, i) : Floats<V>{});
  }
  template <int V>
  __device__ void store(int64_t i, const Floats<V>& x) const {
    cuda::store<V>(data, dtype, i, x);
  }
  template <int V>
  __device__ void put(int64_t i, Bits<float, V> bits) const {
    store<V>(i, floats_of<float, V>(bits));
  }
  template <int V>
  __device__ Bits<float, V> rounded(const Floats<V>& x) const {  // absent, it is f32
    if (dtype == DType::bf16) return bits_of<float, V>(floats_of<__nv_bfloat16, V>(bits_of<__nv_bfloat16, V>(x)));
    if (dtype == DType::f16) return bits_of<float, V>(floats_of<__half, V>(bits_of<__half, V>(x)));
    return bits_of<float, V>(x);
  }
  template <int V>
  __device__ void stage(Bits<float, V>* to, int64_t i) const {
    *to = fetch<V>(i, true);
  }
};

template <class T, int V>
using Raw = Bits<typename Matrix<T>::Element, V>;

template <class T, int V>
__device__ inline Floats<V> floats_in(Raw<T, V> raw) {
  return floats_of<typename Matrix<T>::Element, V>(raw);
}

// Calls f.template operator()<X, S, V>(): branch and stream by name where both have one dtype and 16 bytes fit, else by
// what the tensors carry, in fours or one by one. Absent tensors agree with all.
template <class F>
void by_types(std::initializer_list<View> branch, std::initializer_list<View> stream, const View& weight, int64_t C,
              F f) {
  const DType x = branch.begin()->dtype, s = stream.begin()->dtype;
  bool known = true, aligned = reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
  for (const auto& [views, dtype] : {std::pair{branch, x}, std::pair{stream, s}})
    for (const View& v : views) {
      known = known && (!v || v.dtype == dtype);
      aligned = aligned && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    }
  if (!aligned || C % 4) return f.template operator()<Any, Any, 1>();
  if (known && s == DType::f32) {
    if (x == DType::f32) return f.template operator()<float, float, 4>();
    if (x == DType::bf16) return f.template operator()<__nv_bfloat16, float, 4>();
    return f.template operator()<__half, float, 4>();
  }
  if (known && x == s && C % 8 == 0) {
    if (x == DType::bf16) return f.template operator()<__nv_bfloat16, __nv_bfloat16, 8>();
    return f.template operator()<__half, __half, 8>();
  }
  f.template operator()<Any, Any, 4>();
}

}  // namespace cuda
}  // namespace igpt
