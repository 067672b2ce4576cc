// Host side of TMA: one tensor map from a base address, sizes and strides. The driver's encoder is asked for by name,
// so that the extension links no libcuda and imports where there is no driver.
#pragma once
#include <cuda.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace igpt {
namespace cuda {

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
#if defined(IGPT_SIMT)
  return &cuTensorMapEncodeTiled;
#else
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
             "cuTensorMapEncodeTiled");
  if (!found) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
#endif
}

// size, box: RANK numbers, innermost first, counted in elements; stride: the RANK - 1 outer strides, in elements.
// swizzle: CU_TENSOR_MAP_SWIZZLE_*; the inner box is then exactly that many bytes. fetched: what the L2 cache asks
// memory for at a time, CU_TENSOR_MAP_L2_PROMOTION_*.
template <int RANK>
CUtensorMap tensor_map(const void* base, DType dtype, const uint64_t (&size)[RANK], const uint64_t (&stride)[RANK - 1],
                       const uint32_t (&box)[RANK], CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion fetched = CU_TENSOR_MAP_L2_PROMOTION_L2_128B) {
  const CUtensorMapDataType type = dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const uint64_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  cuuint64_t sizes[RANK], strides[RANK];
  cuuint32_t boxes[RANK], ones[RANK];
  for (int i = 0; i < RANK; ++i) sizes[i] = size[i], boxes[i] = box[i], ones[i] = 1;
  for (int i = 0; i + 1 < RANK; ++i) strides[i] = stride[i] * bytes;
  static const auto encode = tensor_map_encoder();
  CUtensorMap map;
  const CUresult result = encode(&map, type, RANK, const_cast<void*>(base), sizes, strides, boxes, ones,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, fetched, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::invalid_argument("tensor map refused (error " + std::to_string(int(result)) +
                                "): base and strides must be multiples of 16 bytes, boxes at most 256 elements");
  return map;
}

}  // namespace cuda
}  // namespace igpt
