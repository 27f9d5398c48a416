// SPDX-License-Identifier: Apache-2.0
// embed_patches for CUDA: the patches are gathered, torch multiplies them, and one pass adds the positions.
//
// The product bounds it: 256 x 49 patches of 768 values by a 1024 x 768 weight are 20 GFLOP, 25 us at 800 TFLOP/s in
// bfloat16; the patches are written and read once (38 MB, 13 us), the positions cost a read and a write of the result
// (51 MB, 17 us). The bias is added by torch's product.
#include "cuda/patches.h"

namespace sslkernels::patches {
namespace {

// out[row] += position[id of the row]; NaN where the id is bad
template <typename Out, int width>
__global__ void __launch_bounds__(kThreads)
    add_position_kernel(Out* __restrict__ out, Ids ids, Divider per_sample, Divider units, int64_t count,
                        const void* __restrict__ position, Dtype dtype, int64_t row_stride, int64_t stride) {
  using T = Wide<Out>;
  constexpr int kInFlight = 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight), before = first / units.divisor;
  const uint32_t offset = static_cast<uint32_t>(first - before * units.divisor) + threadIdx.x;
  Vector<Out, width> x[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i * kThreads + threadIdx.x < count)
      x[i] = reinterpret_cast<const Vector<Out, width>*>(out)[first + i * kThreads + threadIdx.x];
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t at = first + i * kThreads + threadIdx.x;
    if (at >= count)
      return;
    const uint32_t n = offset + i * kThreads, q = units.quotient(n);
    const uint32_t row = static_cast<uint32_t>(before) + q, b = per_sample.quotient(row);
    const int64_t id = ids.at(b, row - b * per_sample.divisor);
    T p[width];
    if (ids.has(id)) {
      load(position, dtype, id * row_stride + (n - q * units.divisor) * width * stride, p);
    } else {
#pragma unroll
      for (int w = 0; w < width; ++w) p[w] = static_cast<T>(NAN);
    }
#pragma unroll
    for (int w = 0; w < width; ++w) p[w] += number<T>(x[i].values[w]);
    store<Out>(out, at * width, p);
  }
}

void add_position(const Tensor& out, const Ids& ids, const Tensor& position, const Device& device) {
  const int64_t dim = out.size(2), rows = ids.rows * ids.per_sample;
  const Dtype dtype = kind(position.scalar_type());
  STD_TORCH_CHECK(position.dim() == 2 && position.size(0) == ids.length && position.size(1) == dim,
                  "position must be (L, D)");
  STD_TORCH_CHECK(dtype != Dtype::float64 || out.scalar_type() == ScalarType::Double,
                  "position must not be wider than weight");
  check_device("position", position, out);
  with_float(kind(out.scalar_type()), [&](auto tag) {
    using Out = typename decltype(tag)::type;
    const auto launch = [&](auto size) {
      constexpr int width = decltype(size)::value;
      const int64_t units = dim / width;
      device.launch(&add_position_kernel<Out, width>, blocks_of(rows * units, 4 * kThreads), kThreads, 0,
                    static_cast<Out*>(out.mutable_data_ptr()), ids, Divider(ids.per_sample), Divider(units),
                    rows * units, position.const_data_ptr(), dtype, position.stride(0), position.stride(1));
    };
    constexpr int width = kVector<Out>;
    const int64_t bytes = bytes_of(dtype);
    if (dim % width == 0 && position.stride(1) == 1 &&
        aligned(position.const_data_ptr(), width * bytes, bytes, {position.stride(0)}))
      launch(std::integral_constant<int, width>{});
    else
      launch(std::integral_constant<int, 1>{});
  });
}

std::tuple<Tensor, Tensor> embed_patches(const Tensor& images, const Optional& ids_tensor, const Tensor& weight,
                                         const Optional& bias, const Optional& position, std::vector<int64_t> patch,
                                         bool channels_last, const Optional& mean_std) {
  const Grid grid = grid_of(images, patch);
  const Ids ids(ids_tensor, images, grid.batch, grid.length);
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == grid.values,
                  "weight must have the values of a patch in each row");
  check_device("weight", weight, images);
  const Device device(images);
  const Tensor patches = gather(images, ids_tensor, patch, channels_last, mean_std, dtype);
  const Tensor out = empty_like(images, {grid.batch, ids.per_sample, weight.size(0)}, dtype);
  const int64_t rows = grid.batch * ids.per_sample;
  // as matrices, for which torch's product takes the bias; with `out` it is left alone by autocast
  using torch::stable::detail::from;
  StableIValue stack[4] = {from(torch::stable::view(patches, {rows, grid.values})), from(weight), from(bias),
                           from(torch::stable::view(out, {rows, weight.size(0)}))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack, TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(torch::stable::detail::to<AtenTensorHandle>(stack[0])));
  if (position)
    add_position(out, ids, *position, device);
  return {out, patches};
}

}  // namespace
}  // namespace sslkernels::patches

SSLKERNELS_CUDA_OPS(library) { library.impl("embed_patches", TORCH_BOX(&sslkernels::patches::embed_patches)); }
