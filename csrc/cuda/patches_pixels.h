// SPDX-License-Identifier: Apache-2.0
// Pixels of any dtype as numbers, and a warp that reads one patch into dense values.
#pragma once

#include "cuda/patches.h"

namespace sslkernels::patches {

// Pixels as numbers: bytes divided by 255, then (x - mean) / std for each channel.
struct Pixels {
  Pixels(const Tensor& images, const Optional& given, const Grid& grid, bool channels_last, bool wide);

  // bytes of the table that `prepare` fills, a multiple of 16
  int64_t table_bytes(bool wide) const { return mean_std ? (2 * channels * (wide ? 8 : 4) + 15) / 16 * 16 : 0; }

  // Fills the block's table with what a channel is reduced by, then what it is multiplied by.
  template <typename T>
  __device__ void prepare(T* table) const {
    if (mean_std == nullptr)
      return;
    const T* rows = static_cast<const T*>(mean_std);
    const double unit = dtype == Dtype::uint8 ? 255 : 1;
    for (uint32_t c = threadIdx.x; c < channels; c += blockDim.x) {
      table[c] = static_cast<T>(unit * rows[c * stride]);
      table[channels + c] = static_cast<T>(1 / (unit * rows[row_stride + c * stride]));
    }
    __syncthreads();
  }

  // of a value of a patch
  __device__ uint32_t channel(uint32_t value) const {
    const uint32_t q = period.quotient(value);
    return channels_last ? value - q * period.divisor : q;
  }

  // Whether `n` adjacent values that begin at a multiple of `n` need one row of the table, or are known to turn.
  bool allows(int n) const { return mean_std == nullptr || channels_last || period.divisor % n == 0; }

  // What pixels of one unit are worth, that are values `first`, `first` + `step`, ... of their patch.
  template <typename T, typename S, int width>
  __device__ void values(const Vector<S, width>& x, const T* table, uint32_t first, int64_t step, T (&y)[width]) const {
    if (mean_std == nullptr) {
#pragma unroll
      for (int w = 0; w < width; ++w) y[w] = plain<T>(x.values[w]);
      return;
    }
    const bool turning = step == (channels_last ? 1 : period.divisor);  // to the next channel
    uint32_t c = channel(first);
#pragma unroll
    for (int w = 0; w < width; ++w) {
      y[w] = (number<T>(x.values[w]) - table[c]) * table[channels + c];
      if (turning)
        c = c + 1 == channels ? 0 : c + 1;
    }
  }

  // x / 255 to the last bit. 0x10101 x / 2^24 is exact and falls short of it by a part in 2^24, more than half a
  // spacing.
  template <typename T, typename S>
  __device__ static T plain(S x) {
    if constexpr (!std::is_same_v<S, uint8_t>) {
      return number<T>(x);
    } else if constexpr (std::is_same_v<T, double>) {
      return static_cast<double>(x) / 255;
    } else {
      const float below = static_cast<float>(x) * (65793.0f / 16777216.0f);
      return below + below * (1.0f / 16777216.0f);
    }
  }

  const void* mean_std = nullptr;  // (2, C), in the dtype of the arithmetic
  int64_t row_stride = 0, stride = 0;
  uint32_t channels;
  Divider period;  // a channel has as many values in a row, or there are as many channels if they are last
  bool channels_last;
  Dtype dtype;
};

// Where whole patches are read from.
struct Source {
  const void* data;
  Axes axes;  // to dense values
  Pixels pixels;
  bool vectors;  // of kReadWidth pixels; float64 has few users, and is read pixel by pixel
};

constexpr int kReadWidth = 4;  // pixels of one load that are not values of one store: more meet in the same banks

Source source_of(const Tensor& images, const Grid& grid, const Pixels& pixels, bool wide);

template <typename S, int width, typename T>
__device__ void read_units(const Source& source, int64_t patch, const T* table, T* slot, int lane) {
  constexpr int kInFlight = width == 1 ? 8 : 4;
  const auto* data = static_cast<const S*>(source.data) + patch;
  const int64_t step = source.axes.step;
  for (uint32_t u0 = lane; u0 < source.axes.units; u0 += kInFlight * kWarp) {
    Vector<S, width> x[kInFlight];
    uint32_t value[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t u = u0 + i * kWarp;
      if (u < source.axes.units) {
        int64_t from, to;
        source.axes.at(u, &from, &to);
        value[i] = static_cast<uint32_t>(to);
        x[i] = *reinterpret_cast<const Vector<S, width>*>(data + from);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (u0 + i * kWarp < source.axes.units) {
        T y[width];
        source.pixels.values(x[i], table, value[i], step, y);
#pragma unroll
        for (int w = 0; w < width; ++w) slot[value[i] + w * step] = y[w];
      }
    }
  }
}

// One warp puts the values of the patch that starts at element `patch` into its slot.
template <typename T>
__device__ inline void read_patch(const Source& source, int64_t patch, const T* table, T* slot, int lane) {
  const auto read = [&](auto tag) {
    using S = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, float>) {
      if (source.vectors)
        return read_units<S, kReadWidth>(source, patch, table, slot, lane);
    }
    read_units<S, 1>(source, patch, table, slot, lane);
  };
  switch (source.pixels.dtype) {
    case Dtype::float32:
      read(Tag<float>{});
      break;
    case Dtype::bfloat16:
      read(Tag<__nv_bfloat16>{});
      break;
    case Dtype::float16:
      read(Tag<__half>{});
      break;
    case Dtype::uint8:
      read(Tag<uint8_t>{});
      break;
    case Dtype::float64:
      if constexpr (std::is_same_v<T, double>)
        read(Tag<double>{});
      break;
  }
  __syncwarp();
}

// Warps of a block whose slots of `values` fit into shared memory beside the table; 0 if none does, and the slots are
// in global memory.
struct Slots {
  Slots(int64_t values, int64_t element, int64_t table_) : table(table_) {
    constexpr int64_t kShared = 48 << 10;
    bytes = (values * element + 15) / 16 * 16;
    warps = static_cast<int>(std::min<int64_t>(kThreads / kWarp, (kShared - table) / std::max<int64_t>(bytes, 1)));
    in_global = warps < 1;
    warps = std::max(warps, 1);
    shared = static_cast<size_t>(table + (in_global ? 0 : warps * bytes));
  }

  template <typename T>
  __device__ T* of(char* scratch, char* shared_memory, int64_t row, int warp) const {
    return reinterpret_cast<T*>(in_global ? scratch + row * bytes : shared_memory + table + warp * bytes);
  }

  int64_t table, bytes;
  int warps;
  bool in_global;
  size_t shared;
};

}  // namespace sslkernels::patches
