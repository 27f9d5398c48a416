// SPDX-License-Identifier: Apache-2.0
// gather_patches and permute_patches for CUDA.
//
// A group of lanes moves one patch, four independent loads at a time: "direct" where a vector of the result is one of
// the image, else by way of shared memory, which turns planes into pixels and back. Only bytes count: 256 images, 49 of
// 196 patches of 16 x 16 x 3 in bfloat16, read and write 19 MB each, 13 us at 3 TB/s. A row of a patch is 32 bytes
// then, one sector; memory that is read by 64 bytes brings neighbours along which may not be wanted.
#include "cuda/patches_pixels.h"

namespace sslkernels::patches {
namespace {

constexpr int kInFlight = 4;

// How `count` units of a row are shared by lanes, as many as they keep busy.
int group_of(int64_t units) {
  int lanes = kWarp;
  while (lanes > 1 && lanes / 2 >= units) lanes /= 2;
  return lanes;
}

template <typename S, typename Out, int width>
__global__ void __launch_bounds__(kThreads, 4)
    gather_direct_kernel(const S* __restrict__ images, Out* __restrict__ out, Ids ids, Divider per_sample,
                         Places places, Axes axes, Pixels pixels, int64_t values, int lanes) {
  using T = Wide<Out>;
  T* const table = dynamic_shared<T>();
  pixels.prepare(table);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  if (row >= ids.rows * ids.per_sample)
    return;
  const uint32_t b = per_sample.quotient(static_cast<uint32_t>(row));
  const int64_t id = ids.at(b, row - int64_t{b} * ids.per_sample);
  const uint32_t lane = threadIdx.x % lanes;
  Out* const to = out + row * values;
  if (!ids.has(id)) {
    T nan[width];
#pragma unroll
    for (int w = 0; w < width; ++w) nan[w] = static_cast<T>(NAN);
    for (uint32_t u = lane; u < axes.units; u += lanes) store<Out>(to, int64_t{u} * width, nan);
    return;
  }
  const S* const from = images + places.at(b, static_cast<uint32_t>(id));
  for (uint32_t u0 = lane; u0 < axes.units; u0 += kInFlight * lanes) {
    Vector<S, width> x[kInFlight];
    uint32_t value[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (u0 + i * lanes < axes.units) {
        int64_t at, there;
        axes.at(u0 + i * lanes, &at, &there);
        value[i] = static_cast<uint32_t>(there);
        x[i] = *reinterpret_cast<const Vector<S, width>*>(from + at);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (u0 + i * lanes < axes.units) {
        T y[width];
        pixels.values(x[i], table, value[i], 1, y);
        store<Out>(to, value[i], y);
      }
    }
  }
}

template <typename Out, typename T>
__device__ inline void write_patch(const T* slot, Out* out, int64_t values, bool bad, int lane) {
  constexpr int width = kVector<Out>;
  const auto write = [&](auto size) {
    constexpr int n = decltype(size)::value;
    for (int64_t i = n * lane; i < values; i += n * kWarp) {
      T y[n];
      if (bad) {
#pragma unroll
        for (int w = 0; w < n; ++w) y[w] = static_cast<T>(NAN);
      } else {
        load<T>(slot, i, y);
      }
      store<Out>(out, i, y);
    }
  };
  if (values % width == 0)
    write(std::integral_constant<int, width>{});
  else
    write(std::integral_constant<int, 1>{});
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    gather_staged_kernel(Source source, void* out, Dtype dtype, Ids ids, Divider per_sample, Places places,
                         int64_t values, Slots slots, char* scratch) {
  char* const shared = dynamic_shared<char>();
  T* const table = reinterpret_cast<T*>(shared);
  source.pixels.prepare(table);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * slots.warps + warp;
  if (row >= ids.rows * ids.per_sample)
    return;
  const uint32_t b = per_sample.quotient(static_cast<uint32_t>(row));
  const int64_t id = ids.at(b, row - int64_t{b} * ids.per_sample);
  const bool bad = !ids.has(id);
  T* const slot = slots.of<T>(scratch, shared, row, warp);
  if (!bad)
    read_patch(source, places.at(b, static_cast<uint32_t>(id)), table, slot, lane);
  switch (dtype) {
    case Dtype::float64:
      return write_patch(slot, static_cast<double*>(out) + row * values, values, bad, lane);
    case Dtype::bfloat16:
      return write_patch(slot, static_cast<__nv_bfloat16*>(out) + row * values, values, bad, lane);
    case Dtype::float16:
      return write_patch(slot, static_cast<__half*>(out) + row * values, values, bad, lane);
    default:
      return write_patch(slot, static_cast<float*>(out) + row * values, values, bad, lane);
  }
}

struct Gather {
  const Tensor& images;
  const Tensor& out;
  const Grid& grid;
  const Ids& ids;
  const Pixels& pixels;
  const Device& device;
};

template <typename S, typename Out>
bool direct(const Gather& g, bool wide) {
  constexpr int width = kVector<Out>;
  Axes axes(g.grid.shape, g.grid.stride, g.grid.dense(g.pixels.channels_last));
  if (axes.step != 1 || !g.pixels.allows(width) ||
      !axes.widen_to(width, g.images.const_data_ptr(), sizeof(S), g.grid.places))
    return false;
  const int lanes = group_of(axes.units);
  const unsigned blocks = blocks_of(g.ids.rows * g.ids.per_sample, kThreads / lanes);
  g.device.launch(&gather_direct_kernel<S, Out, width>, blocks, kThreads,
                  static_cast<size_t>(g.pixels.table_bytes(wide)), static_cast<const S*>(g.images.const_data_ptr()),
                  static_cast<Out*>(g.out.mutable_data_ptr()), g.ids, Divider(g.ids.per_sample), g.grid.places, axes,
                  g.pixels, g.grid.values, lanes);
  return true;
}

// Where float64 meets another dtype the staged kernel serves.
bool try_direct(const Gather& g, bool wide) {
  if (wide && (g.pixels.dtype != Dtype::float64 || g.out.scalar_type() != ScalarType::Double))
    return false;
  bool done = false;
  with_float(kind(g.out.scalar_type()), [&](auto tag) {
    using Out = typename decltype(tag)::type;
    if constexpr (std::is_same_v<Out, double>) {
      done = direct<double, Out>(g, wide);
    } else if (g.pixels.dtype == Dtype::uint8) {
      done = direct<uint8_t, Out>(g, wide);
    } else {
      with_float(g.pixels.dtype, [&](auto pixel) {
        using S = typename decltype(pixel)::type;
        if constexpr (!std::is_same_v<S, double>)
          done = direct<S, Out>(g, wide);
      });
    }
  });
  return done;
}

template <typename T>
void staged(const Gather& g) {
  const Slots slots(g.grid.values, sizeof(T), g.pixels.table_bytes(sizeof(T) == 8));
  const int64_t rows = g.ids.rows * g.ids.per_sample;
  const Tensor scratch = empty_like(g.out, {slots.in_global ? rows * slots.bytes : 0}, ScalarType::Byte);
  g.device.launch(&gather_staged_kernel<T>, blocks_of(rows, slots.warps), slots.warps * kWarp, slots.shared,
                  source_of(g.images, g.grid, g.pixels, sizeof(T) == 8), g.out.mutable_data_ptr(),
                  kind(g.out.scalar_type()), g.ids, Divider(g.ids.per_sample), g.grid.places, g.grid.values, slots,
                  static_cast<char*>(scratch.mutable_data_ptr()));
}

// One warp moves one patch, in whatever words both sides allow: `unit` bytes.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    permute_kernel(const char* __restrict__ images, char* __restrict__ out, Ids ids, Inverse inverse, bool backwards,
                   Divider length, Places from_places, Places to_places, Axes axes, int64_t element, Unit nothing) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= ids.rows * ids.length)
    return;
  const uint32_t lane = threadIdx.x % kWarp, b = length.quotient(static_cast<uint32_t>(row));
  const uint32_t l = static_cast<uint32_t>(row) - b * length.divisor;
  const bool bad = inverse.spoiled[b] != 0;
  const uint32_t id = bad ? 0 : static_cast<uint32_t>(backwards ? inverse.at(b, l) : ids.at(b, l));
  const char* const from = images + element * from_places.at(b, id);
  char* const to = out + element * to_places.at(b, l);
  for (uint32_t u0 = lane; u0 < axes.units; u0 += kInFlight * kWarp) {
    Unit x[kInFlight];
    int64_t at, there[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (u0 + i * kWarp < axes.units) {
        axes.at(u0 + i * kWarp, &at, &there[i]);
        x[i] = bad ? nothing : *reinterpret_cast<const Unit*>(from + element * at);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (u0 + i * kWarp < axes.units)
        *reinterpret_cast<Unit*>(to + element * there[i]) = x[i];
    }
  }
}

Tensor permute_patches(const Tensor& images, const Tensor& ids_tensor, std::vector<int64_t> patch, bool backwards) {
  const Grid from = grid_of(images, patch);
  const Ids ids(ids_tensor, images, from.batch, from.length);
  STD_TORCH_CHECK(ids.per_sample == from.length, "ids must be a permutation of all patches");
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < images.dim(); ++axis) sizes.push_back(images.size(axis));
  const Tensor out = empty_like(images, sizes, images.scalar_type());
  const Grid to = grid_of(out, patch);
  const Device device(images);
  const Inverted inverted = invert(ids, images, device);
  const Dtype dtype = kind(images.scalar_type());
  const int64_t element = bytes_of(dtype);
  const auto* src = static_cast<const char*>(images.const_data_ptr());
  auto* dst = static_cast<char*>(out.mutable_data_ptr());
  Axes axes(from.shape, from.stride, to.stride);
  Axes swapped(from.shape, to.stride, from.stride);
  const int width = static_cast<int>(16 / element);
  const bool vectors = axes.step == 1 && swapped.widen_to(width, dst, element, to.places) &&
                       axes.widen_to(width, src, element, from.places);
  const unsigned blocks = blocks_of(from.batch * from.length, kThreads / kWarp);
  const auto launch = [&](auto nothing) {
    device.launch(&permute_kernel<decltype(nothing)>, blocks, kThreads, 0, src, dst, ids, inverted.inverse, backwards,
                  Divider(from.length), from.places, to.places, axes, element, nothing);
  };
  with_word(dtype, vectors, launch);
  return out;
}

Tensor gather_patches(const Tensor& images, const Optional& ids, std::vector<int64_t> patch, bool channels_last,
                      const Optional& mean_std, ScalarType dtype) {
  return gather(images, ids, patch, channels_last, mean_std, dtype);
}

}  // namespace

Tensor gather(const Tensor& images, const Optional& ids_tensor, const std::vector<int64_t>& patch, bool channels_last,
              const Optional& mean_std, ScalarType dtype) {
  const Grid grid = grid_of(images, patch);
  const Ids ids(ids_tensor, images, grid.batch, grid.length);
  const bool wide = images.scalar_type() == ScalarType::Double || dtype == ScalarType::Double;
  const Pixels pixels(images, mean_std, grid, channels_last, wide);
  const Tensor out = empty_like(images, {grid.batch, ids.per_sample, grid.values}, dtype);
  const Device device(images);
  const Gather g{images, out, grid, ids, pixels, device};
  if (!try_direct(g, wide)) {
    if (wide)
      staged<double>(g);
    else
      staged<float>(g);
  }
  return out;
}

}  // namespace sslkernels::patches

SSLKERNELS_CUDA_OPS(library) {
  library.impl("gather_patches", TORCH_BOX(&sslkernels::patches::gather_patches));
  library.impl("permute_patches", TORCH_BOX(&sslkernels::patches::permute_patches));
}
