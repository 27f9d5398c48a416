// SPDX-License-Identifier: Apache-2.0
// How an op reaches the GPU: the device and stream of its tensors, and one way to launch a kernel. Without nvcc
// tests/cuda/emulator takes the place of CUDA, and the same sources run on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/grid.h"

namespace sslkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Makes the device of a tensor current while it lives, and launches on the stream that torch uses there.
class Device {
 public:
#ifdef SSLKERNELS_EMULATED
  explicit Device(const Tensor&) {}
  int multiprocessors() const { return 2; }
#else
  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    index_ = x.get_device_index();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }
#endif

  // kernel(arguments...) on `blocks` x `threads`, with `shared` bytes of dynamic shared memory. No block: no launch.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared, Arguments&&... arguments) const {
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) {
      return;
    }
#ifdef SSLKERNELS_EMULATED
    emulator::run(blocks, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
    constexpr size_t kWithoutAsking = 48 << 10;
    if (shared > kWithoutAsking) {
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
    STD_CUDA_CHECK(cudaGetLastError());
#endif
  }

 private:
#ifndef SSLKERNELS_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int32_t index_ = 0;
#endif
};

// The dynamic shared memory of a block, aligned to 16 bytes.
template <typename T>
__device__ inline T* dynamic_shared() {
#ifdef SSLKERNELS_EMULATED
  return reinterpret_cast<T*>(emulator::block.shared.data());
#else
  extern __shared__ int4 memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

// A kernel given a pointer into another device's memory would fault: the one check of `name` that C++ repeats.
inline void check_device(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  " must be on the device of the other tensors");
}

// A fresh contiguous tensor on the device of `like`.
inline Tensor empty_like(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
#ifdef SSLKERNELS_EMULATED
  int64_t count = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; count *= sizes[d]) strides[d] = count;
  if (count > 0) {
    const auto bytes = static_cast<int64_t>(torch::stable::empty({0}, dtype).element_size());
    void* memory = emulator::allocate(count * bytes);
    return torch::stable::from_blob(memory, sizes, strides, like.device(), dtype, emulator::release);
  }
#endif
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

}  // namespace sslkernels

// SSLKERNELS_CUDA_OPS(library) { library.impl("op", TORCH_BOX(&function)); }, once a source file. The library is not
// loaded where the driver is too old for it.
#ifdef SSLKERNELS_EMULATED
#define SSLKERNELS_CUDA_KEY PrivateUse1
#else
#define SSLKERNELS_CUDA_KEY CUDA
#endif
#define SSLKERNELS_CUDA_OPS(library) SSLKERNELS_CUDA_OPS_UNDER(sslkernels, SSLKERNELS_CUDA_KEY, library)
#define SSLKERNELS_CUDA_OPS_UNDER(space, key, library) STABLE_TORCH_LIBRARY_IMPL(space, key, library)
