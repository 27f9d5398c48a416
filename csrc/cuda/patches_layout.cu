// SPDX-License-Identifier: Apache-2.0
// How the patches of a tensor lie in memory, and which place each id has.
#include <algorithm>

#include "cuda/patches_pixels.h"

namespace sslkernels::patches {

Grid grid_of(const Tensor& images, const std::vector<int64_t>& patch) {
  std::vector<int64_t> sizes, strides;
  for (int64_t axis = 0; axis < images.dim(); ++axis) {
    sizes.push_back(images.size(axis));
    strides.push_back(images.stride(axis));
  }
  return {sizes, strides, patch};
}

Axes::Axes(const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& from, const std::array<int64_t, 4>& to) {
  struct One {
    int64_t size, from, to;
  };
  std::vector<One> sorted, merged;
  for (int a = 0; a < 4; ++a) {
    if (sizes[a] != 1)
      sorted.push_back({sizes[a], from[a], to[a]});
  }
  std::stable_sort(sorted.begin(), sorted.end(), [](const One& a, const One& b) { return a.from > b.from; });
  for (const One& one : sorted) {
    if (!merged.empty() && merged.back().from == one.size * one.from && merged.back().to == one.size * one.to)
      merged.back() = {merged.back().size * one.size, one.from, one.to};
    else
      merged.push_back(one);
  }
  if (merged.empty())
    merged.push_back({1, 1, 1});
  units = 1;
  for (const One& one : merged) {
    axis[rank++] = {Divider(one.size), one.from, one.to};
    units *= static_cast<uint32_t>(one.size);
  }
  step = merged.back().to;
}

bool Axes::widen_to(int n, const void* data, int64_t element, const Places& places) {
  Axis& inner = axis[rank - 1];
  if (inner.from != 1 || units == 0 || inner.size.divisor % n != 0 ||
      !aligned(data, n * element, element, {places.batch, places.frame, places.row, places.col}))
    return false;
  for (int a = 0; a < rank - 1; ++a) {
    if (!aligned(nullptr, n * element, element, {axis[a].from}))
      return false;
  }
  inner = {Divider(inner.size.divisor / n), n, n * inner.to};
  units /= n;
  return true;
}

Pixels::Pixels(const Tensor& images, const Optional& given, const Grid& grid, bool last, bool wide)
    : channels(static_cast<uint32_t>(grid.shape[0])),
      period(last ? grid.shape[0] : grid.values / std::max<int64_t>(grid.shape[0], 1)),
      channels_last(last),
      dtype(kind(images.scalar_type())) {
  if (!given)
    return;
  STD_TORCH_CHECK(given->dim() == 2 && given->size(0) == 2 && given->size(1) == grid.shape[0] &&
                      given->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "mean_std must be (2, C) of the dtype of the arithmetic");
  check_device("mean_std", *given, images);
  mean_std = given->const_data_ptr();
  row_stride = given->stride(0);
  stride = given->stride(1);
}

Source source_of(const Tensor& images, const Grid& grid, const Pixels& pixels, bool wide) {
  Source source{images.const_data_ptr(), Axes(grid.shape, grid.stride, grid.dense(pixels.channels_last)), pixels,
                false};
  source.vectors = !wide && pixels.allows(kReadWidth) &&
                   source.axes.widen_to(kReadWidth, source.data, bytes_of(pixels.dtype), grid.places);
  return source;
}

namespace {

// One block a sample. Of ids that name the same place any may be written first; the others find it, and then all agree
// that there are several.
__global__ void __launch_bounds__(kThreads) invert_kernel(Ids ids, Inverse inverse) {
  const int64_t b = blockIdx.x;
  int32_t* const positions = inverse.positions + b * ids.length;
  __shared__ int spoiled;
  if (threadIdx.x == 0)
    spoiled = 0;
  for (int64_t l = threadIdx.x; l < ids.length; l += kThreads) positions[l] = kNone;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < ids.per_sample; k += kThreads) {
    const int64_t id = ids.at(b, k);
    if (ids.has(id))
      positions[id] = static_cast<int32_t>(k);
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < ids.per_sample; k += kThreads) {
    const int64_t id = ids.at(b, k);
    if (!ids.has(id)) {
      spoiled = 1;
    } else if (positions[id] != static_cast<int32_t>(k)) {
      positions[id] = kSeveral;
      spoiled = 1;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0)
    inverse.spoiled[b] = spoiled;
}

}  // namespace

Inverted invert(const Ids& ids, const Tensor& like, const Device& device) {
  Tensor memory = empty_like(like, {ids.rows * (ids.length + 1)}, ScalarType::Int);
  auto* positions = static_cast<int32_t*>(memory.mutable_data_ptr());
  const Inverse inverse{positions, positions + ids.rows * ids.length, ids.length};
  device.launch(&invert_kernel, static_cast<unsigned>(ids.rows), kThreads, 0, ids, inverse);
  return {memory, inverse};
}

}  // namespace sslkernels::patches
