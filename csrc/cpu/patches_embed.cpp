// SPDX-License-Identifier: Apache-2.0
// embed_patches: patches are read, multiplied and given their positions in one parallel region, a panel at a time.
#include "cpu/patches.h"

namespace sslkernels {

namespace {

// Rows of a panel, at most. The product packs the whole weight for each, so smaller ones, which would stay in the
// second-level cache, cost more than they save.
constexpr i64 kPanel = 1024;

template <typename T>
void embed(const Grid& grid, const std::optional<Ids>& ids, const Pixels<T>& pixels, bool channels_last,
           const Tensor& weight, const Optional& bias, const Optional& position, const Tensor& patches,
           const Tensor& out) {
  const i64 count = out.size(1), dim = out.size(2), values = patches.size(2), rows = grid.batch * count;
  const View<T> product{data<T>(weight), dim, values, weight.stride(0), weight.stride(1)};
  const i64 threads = useful_threads(2.0 * rows * dim * values);
  const i64 panels = threads * ((rows + threads * kPanel - 1) / (threads * kPanel));  // as many for each thread
  Buffer<T> table(position ? grid.length * dim : 0), shift(dim);
  std::fill_n(static_cast<T*>(shift), dim, T(0));
  if (bias)
    tiles<T>().load(bias->const_data_ptr(), kind(*bias), 0, bias->stride(0), shift, 1, dim, T(1));
  if (position) {
    tiles<T>().load(position->const_data_ptr(), kind(*position), position->stride(0), position->stride(1), table,
                    grid.length, dim, T(1));
    tiles<T>().add(table, dim, shift, 0, grid.length, dim);
  }
  run(threads, [&](i64 t) {
    for (i64 panel = panels * t / threads; panel < panels * (t + 1) / threads; ++panel) {
      const i64 begin = rows * panel / panels, end = rows * (panel + 1) / panels;
      if (begin == end)
        continue;
      T *x = data<T>(patches) + begin * values, *y = data<T>(out) + begin * dim;
      const auto id = [&](i64 i) { return ids ? (*ids)[i] : i % count; };
      for (i64 i = begin; i < end; ++i)
        pixels.read(grid.at(i / count, id(i)), grid.shape, channels_last, x + (i - begin) * values);
      multiply<T>({y, end - begin, dim, dim, 1}, {x, end - begin, values, values, 1}, product.transposed());
      for (i64 i = begin; i < end; ++i)
        tiles<T>().add(y + (i - begin) * dim, dim, position ? table + id(i) * dim : static_cast<T*>(shift), dim, 1,
                       dim);
    }
  });
}

std::tuple<Tensor, Tensor> embed_patches(const Tensor& images, const Optional& ids, const Tensor& weight,
                                         const Optional& bias, const Optional& position, std::vector<i64> patch,
                                         bool channels_last, const Optional& mean_std) {
  const Grid grid(images, patch);
  std::optional<Ids> places;
  if (ids)
    places.emplace(*ids, grid.length, false);
  const i64 count = places ? places->count : grid.length;
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(weight.size(1) == grid.shape.values(), "weight must have the values of a patch in each row");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "weight must be float32 or float64");
  STD_TORCH_CHECK(dtype == ScalarType::Double || grid.dtype != Dtype::kDouble, "weight must be float64 as images are");
  Tensor patches = empty({grid.batch, count, grid.shape.values()}, dtype);
  Tensor out = empty({grid.batch, count, weight.size(0)}, dtype);
  with_type(dtype == ScalarType::Double, [&](auto zero) {
    using T = decltype(zero);
    embed<T>(grid, places, Pixels<T>(grid, mean_std), channels_last, weight, bias, position, patches, out);
  });
  return {out, patches};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) { library.impl("embed_patches", TORCH_BOX(&embed_patches)); }

}  // namespace sslkernels
