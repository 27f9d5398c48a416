// SPDX-License-Identifier: Apache-2.0
// Strided operands of any dtype, products through torch's own BLAS, scratch memory and threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/tiles.h"

namespace sslkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <typename T>
constexpr ScalarType kScalar = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <typename T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

inline Tensor empty(std::vector<i64> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Scratch memory from torch's allocator.
template <typename T>
class Buffer {
 public:
  explicit Buffer(i64 n) : tensor_(empty({n}, kScalar<T>)), data_(data<T>(tensor_)) {}
  operator T*() const { return data_; }

 private:
  Tensor tensor_;
  T* data_;
};

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

// f(zero of the type to compute in): double if asked for, else float
template <typename F>
auto with_type(bool wide, const F& f) {
  return wide ? f(0.0) : f(0.0f);
}

template <typename F>
auto with_type(const Tensor& a, const Tensor& b, const F& f) {
  return with_type(is_double(a) || is_double(b), f);
}

inline Dtype kind(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::Byte:
      return Dtype::kByte;
    default:
      STD_TORCH_CHECK(false, "tensors must be float32, float64, bfloat16, float16 or, for images, uint8");
  }
}

// Rows of a feature tensor, whatever its dtype and strides.
template <typename T>
class Operand {
 public:
  explicit Operand(const Tensor& x)
      : data_(static_cast<const char*>(x.const_data_ptr())),
        rows(x.size(0)),
        cols(x.size(1)),
        row_stride_(x.stride(0)),
        col_stride_(x.stride(1)),
        bytes_(static_cast<i64>(x.element_size())),
        dtype_(kind(x)),
        direct_(x.scalar_type() == kScalar<T> && (col_stride_ == 1 || cols == 1) && row_stride_ >= cols) {}

  // Rows [first, first + count): where they lie if BLAS can read them there, else converted into `scratch`.
  const T* fetch(i64 first, i64 count, T* scratch, i64* ld) const {
    *ld = direct_ ? row_stride_ : cols;
    if (direct_)
      return reinterpret_cast<const T*>(data_) + first * row_stride_;
    load(first, count, scratch, T(1));
    return scratch;
  }

  // Whether `fetch` needs no scratch.
  bool direct() const { return direct_; }

  void load(i64 first, i64 count, T* dst, T factor) const {
    tiles<T>().load(data_ + first * row_stride_ * bytes_, dtype_, row_stride_, col_stride_, dst, count, cols, factor);
  }

 private:
  const char* data_;

 public:
  const i64 rows, cols;

 private:
  i64 row_stride_, col_stride_, bytes_;
  Dtype dtype_;
  bool direct_;
};

// out = a b by torch's BLAS. A view is (pointer, rows, cols, row stride, column stride).
template <typename T>
struct View {
  const T* data;
  i64 rows, cols, row_stride, col_stride;
  View transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

// A handle that the dispatcher's stack takes over; a Tensor around it would cost a small product a tenth of its time.
template <typename T>
StableIValue as_argument(const View<T>& v) {
  const i64 sizes[2] = {v.rows, v.cols}, strides[2] = {v.row_stride, v.col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob_v2(
      const_cast<T*>(v.data), 2, sizes, strides, 0,
      std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(),
      0, &handle, aoti_torch_layout_strided(), nullptr, 0));
  return torch::stable::detail::from(handle);
}

template <typename T>
void multiply(const View<T>& out, const View<T>& a, const View<T>& b) {
  StableIValue stack[3] = {as_argument(a), as_argument(b), as_argument(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(torch::stable::detail::to<AtenTensorHandle>(stack[0])));
}

// f(t) for t in [0, count), one call a thread; inline where count is one or a parallel region is already open.
template <typename F>
void run(i64 count, const F& f) {
  if (count == 1)
    return f(0);
  torch::stable::parallel_for(0, count, 1, [&](i64 begin, i64 end) {
    for (i64 t = begin; t < end; ++t) f(t);
  });
}

struct Range {
  i64 begin, end;
  i64 size() const { return end - begin; }
};

// Part t of `count` parts of [begin, end), as even as multiples of 16 allow.
inline Range part(i64 begin, i64 end, i64 t, i64 count) {
  const i64 blocks = (end - begin + 15) / 16;
  return {std::min(end, begin + blocks * t / count * 16), std::min(end, begin + blocks * (t + 1) / count * 16)};
}

// What an element costs that is only read, changed a little and written, in the flops that threads are counted by: such
// loops wait for memory.
constexpr double kFlopsAnElement = 32;

inline i64 useful_threads(double flops) {
  constexpr double kFlopsWorthAThread = 4e6;
  return std::clamp<i64>(static_cast<i64>(flops / kFlopsWorthAThread), 1, torch::stable::get_num_threads());
}

// f(mine) on each thread's share of the rows
template <typename F>
void over_rows(i64 rows, double flops, const F& f) {
  const i64 threads = useful_threads(flops);
  run(threads, [&](i64 t) { f(part(0, rows, t, threads)); });
}

}  // namespace sslkernels
