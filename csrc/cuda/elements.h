// SPDX-License-Identifier: Apache-2.0
// From the dtype of a tensor to a type of the language.
#pragma once

#include "cuda/launch.h"
#include "cuda/scalars.h"

namespace sslkernels {

// f(zero of the element's type), for the floating dtypes
template <typename F>
void with_element(const char* op, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      STD_TORCH_CHECK(false, op, ": tensors must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace sslkernels
