// SPDX-License-Identifier: Apache-2.0
// standardize and its gradient: columns of mean zero and variance one.
#include <tuple>

#include "common/grid.h"
#include "cuda/correlation_kernels.h"
#include "cuda/elements.h"

namespace sslkernels {
namespace {

template <typename T>
Matrix<T> matrix_of(const Tensor& x) {
  const auto* data = static_cast<const T*>(x.const_data_ptr());
  const bool aligned = reinterpret_cast<uintptr_t>(data) % alignof(Vector<T, kCols<T>>) == 0;
  return {data, x.stride(0), x.stride(1), aligned && x.stride(1) == 1 && x.stride(0) % kCols<T> == 0};
}

template <typename T>
Wide<T>* moments_of(const Tensor& moments) {
  return static_cast<Wide<T>*>(moments.mutable_data_ptr());
}

template <typename Pass>
void over_columns(const Pass& pass, const Tensor& x) {
  constexpr int kThreads = kLanes * kWarp;
  const Device device(x);
  const Parts parts = plan_parts(pass.rows, pass.cols, kStrip<Pass>, device.multiprocessors());
  const dim3 grid(static_cast<unsigned>(parts.strips), static_cast<unsigned>(parts.count));
  if (parts.count == 1) {
    device.launch(&change_kernel<Pass>, grid, kThreads, 0, pass, parts.rows, nullptr);
    return;
  }
  const int64_t bytes = parts.count * pass.cols * static_cast<int64_t>(sizeof(typename Pass::Found));
  const Tensor scratch = empty_like(x, {bytes}, ScalarType::Byte);
  auto* found = static_cast<typename Pass::Found*>(scratch.mutable_data_ptr());
  device.launch(&measure_kernel<Pass>, grid, kThreads, 0, pass, parts.rows, found);
  device.launch(&change_kernel<Pass>, grid, kThreads, 0, pass, parts.rows, found);
}

std::tuple<Tensor, Tensor> standardize(const Tensor& x, double eps, bool unbiased) {
  const int64_t rows = x.size(0), cols = x.size(1);
  const bool wide = x.scalar_type() == ScalarType::Double;
  Tensor out = empty_like(x, {rows, cols}, x.scalar_type());
  Tensor moments = empty_like(x, {3, cols}, wide ? ScalarType::Double : ScalarType::Float);
  with_element("standardize", x, [&](auto zero) {
    using T = decltype(zero);
    over_columns(Standardize<T>{matrix_of<T>(x), rows, cols, eps, static_cast<double>(rows - unbiased),
                                moments_of<T>(moments), static_cast<T*>(out.mutable_data_ptr())},
                 x);
  });
  return {out, moments};
}

Tensor standardize_backward(const Tensor& grad, const Tensor& x, const Tensor& moments, bool unbiased) {
  const int64_t rows = x.size(0), cols = x.size(1);
  check_device("standardize_backward: grad", grad, x);
  check_device("standardize_backward: moments", moments, x);
  Tensor out = empty_like(x, {rows, cols}, x.scalar_type());
  const Tensor given = grad.scalar_type() == x.scalar_type() ? grad : torch::stable::to(grad, x.scalar_type());
  with_element("standardize", x, [&](auto zero) {
    using T = decltype(zero);
    over_columns(
        StandardizeBackward<T>{matrix_of<T>(given), matrix_of<T>(x), rows, cols, static_cast<double>(rows - unbiased),
                               moments_of<T>(moments), static_cast<T*>(out.mutable_data_ptr())},
        x);
  });
  return out;
}

}  // namespace
}  // namespace sslkernels

SSLKERNELS_CUDA_OPS(library) {
  library.impl("standardize", TORCH_BOX(&sslkernels::standardize));
  library.impl("standardize_backward", TORCH_BOX(&sslkernels::standardize_backward));
}
