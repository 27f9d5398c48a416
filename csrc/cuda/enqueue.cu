// SPDX-License-Identifier: Apache-2.0
// enqueue_ for CUDA: rows copied into a ring from where a pointer on the device says, with no host sync.
#include <type_traits>

#include "cuda/elements.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Rows {
  T* data;
  int64_t row_stride, col_stride;
};

template <typename Q, typename S>
constexpr int kWidth = 16 / static_cast<int>(sizeof(Q) > sizeof(S) ? sizeof(Q) : sizeof(S));

template <typename Q, typename S>
__device__ Q converted(S x) {
  if constexpr (std::is_same_v<Q, S>) {
    return x;
  } else {
    return narrow<Q>(widen(x));
  }
}

// Elements [col, col + width) of row j of the keys go into the slot (*pointer + j + skipped) mod size.
template <typename Q, typename S, int width>
__global__ void __launch_bounds__(kThreads)
    enqueue_kernel(Rows<Q> queue, int64_t size, Rows<const S> keys, int64_t rows, int64_t cols, int64_t skipped,
                   const int64_t* pointer) {
  const int64_t at = *pointer;
  if (at < 0 || at >= size)
    return;
  const int64_t vectors = cols / width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * vectors; i += step) {
    const int64_t j = i / vectors, col = i % vectors * width;
    // skipped + j may be any multiple of the size ahead
    const int64_t slot = (at + (skipped + j) % size) % size;
    Q* to = queue.data + slot * queue.row_stride + col * queue.col_stride;
    const S* from = keys.data + (skipped + j) * keys.row_stride + col * keys.col_stride;
    const auto given = *reinterpret_cast<const Vector<S, width>*>(from);
    Vector<Q, width> kept;
#pragma unroll
    for (int w = 0; w < width; ++w) kept.values[w] = converted<Q>(given.values[w]);
    *reinterpret_cast<Vector<Q, width>*>(to) = kept;
  }
}

// A launch of its own: every block of the copy has read the pointer by then.
__global__ void advance_kernel(int64_t* pointer, int64_t size, int64_t count) {
  const int64_t at = *pointer;
  if (at >= 0 && at < size)
    *pointer = (at + count % size) % size;
}

template <typename T>
bool in_vectors(const Tensor& x, int width) {
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  return x.stride(1) == 1 && x.size(1) % width == 0 && x.stride(0) % width == 0 &&
         address % alignof(Vector<T, 16 / sizeof(T)>) == 0;
}

void enqueue_(const Tensor& queue, const Tensor& pointer, const Tensor& keys) {
  check_device("enqueue_: pointer", pointer, queue);
  check_device("enqueue_: keys", keys, queue);
  const int64_t size = queue.size(0), cols = queue.size(1), count = keys.size(0), rows = std::min(count, size);
  const Device device(queue);
  auto* at = static_cast<int64_t*>(pointer.mutable_data_ptr());
  with_element("enqueue_", queue, [&](auto q) {
    with_element("enqueue_", keys, [&](auto s) {
      using Q = decltype(q);
      using S = decltype(s);
      constexpr int kWide = kWidth<Q, S>;
      const Rows<Q> to{static_cast<Q*>(queue.mutable_data_ptr()), queue.stride(0), queue.stride(1)};
      const Rows<const S> from{static_cast<const S*>(keys.const_data_ptr()), keys.stride(0), keys.stride(1)};
      const bool wide = in_vectors<Q>(queue, kWide) && in_vectors<S>(keys, kWide);
      const int64_t work = rows * (wide ? cols / kWide : cols);
      device.launch(wide ? &enqueue_kernel<Q, S, kWide> : &enqueue_kernel<Q, S, 1>, blocks_of(work, kThreads), kThreads,
                    0, to, size, from, rows, cols, count - rows, at);
    });
  });
  if (count > 0)
    device.launch(&advance_kernel, 1, 1, 0, at, size, count);
}

}  // namespace
}  // namespace sslkernels

SSLKERNELS_CUDA_OPS(library) { library.impl("enqueue_", TORCH_BOX(&sslkernels::enqueue_)); }
