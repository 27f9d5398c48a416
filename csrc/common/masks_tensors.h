// SPDX-License-Identifier: Apache-2.0
// Tensors of the masks on the device of their seed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace sslkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline const uint64_t* seed_of(const Tensor& seed) { return static_cast<const uint64_t*>(seed.const_data_ptr()); }
inline int64_t* ids_of(const Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); }
inline uint8_t* flags_of(const Tensor& x) { return static_cast<uint8_t*>(x.mutable_data_ptr()); }

// The elements of an optional tensor, dense, while this lives; null where it is not given.
template <typename T>
class Dense {
 public:
  Dense(const Optional& x, const Tensor& seed) {
    if (!x)
      return;
    STD_TORCH_CHECK(x->is_cuda() == seed.is_cuda() && x->get_device_index() == seed.get_device_index(),
                    "a mask's seed and tensors must be on one device");
    tensor_ = torch::stable::contiguous(*x);
    data_ = static_cast<const T*>(tensor_->const_data_ptr());
  }
  operator const T*() const { return data_; }

 private:
  Optional tensor_;
  const T* data_ = nullptr;
};

}  // namespace sslkernels
