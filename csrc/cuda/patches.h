// SPDX-License-Identifier: Apache-2.0
// What the patch kernels share: elements of a dtype known at launch, lists of ids, and where patches lie in images.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "common/divide.h"
#include "cuda/launch.h"
#include "cuda/scalars.h"

namespace sslkernels::patches {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

enum class Dtype : uint8_t { float32, float64, bfloat16, float16, uint8 };

inline Dtype kind(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Byte:
      return Dtype::uint8;
    default:
      STD_TORCH_CHECK(false, "tensors must be float32, float64, bfloat16, float16 or, for images, uint8");
  }
}

constexpr int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : dtype == Dtype::uint8 ? 1 : 2;
}

template <typename T>
constexpr ScalarType kScalar = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <typename T>
struct Tag {
  using type = T;
};

// f(Tag of the element type)
template <typename F>
void with_float(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(Tag<float>{});
    case Dtype::float64:
      return f(Tag<double>{});
    case Dtype::bfloat16:
      return f(Tag<__nv_bfloat16>{});
    case Dtype::float16:
      return f(Tag<__half>{});
    case Dtype::uint8:
      STD_TORCH_CHECK(false, "only images may be uint8");
  }
}

// A number to compute with; double only where the kernel computes in it.
template <typename T, typename S>
__device__ inline T number(S x) {
  return static_cast<T>(widen(x));
}

template <typename S, int width, typename T>
__device__ inline void load(const void* base, int64_t at, T (&y)[width]) {
  const auto x = *reinterpret_cast<const Vector<S, width>*>(static_cast<const S*>(base) + at);
#pragma unroll
  for (int w = 0; w < width; ++w) y[w] = number<T>(x.values[w]);
}

template <typename S, int width, typename T>
__device__ inline void store(void* base, int64_t at, const T (&y)[width]) {
  Vector<S, width> x;
#pragma unroll
  for (int w = 0; w < width; ++w) x.values[w] = narrow<S, T>(y[w]);
  *reinterpret_cast<Vector<S, width>*>(static_cast<S*>(base) + at) = x;
}

// The same for a floating dtype that is the same in the whole launch.
template <int width, typename T>
__device__ inline void load(const void* base, Dtype dtype, int64_t at, T (&y)[width]) {
  switch (dtype) {
    case Dtype::bfloat16:
      return load<__nv_bfloat16>(base, at, y);
    case Dtype::float16:
      return load<__half>(base, at, y);
    case Dtype::float64:
      if constexpr (std::is_same_v<T, double>)
        return load<double>(base, at, y);
      else
        return;  // the launchers refuse it: then T is double
    default:
      return load<float>(base, at, y);
  }
}

template <int width, typename T>
__device__ inline void store(void* base, Dtype dtype, int64_t at, const T (&y)[width]) {
  switch (dtype) {
    case Dtype::bfloat16:
      return store<__nv_bfloat16>(base, at, y);
    case Dtype::float16:
      return store<__half>(base, at, y);
    case Dtype::float64:
      return store<double>(base, at, y);
    default:
      return store<float>(base, at, y);
  }
}

// f(word): a word of 16 bytes, or of one element, that holds what the elements of bad places become: NaN, 0 in bytes.
template <typename F>
void with_word(Dtype dtype, bool vectors, const F& f) {
  const uint32_t half = dtype == Dtype::bfloat16 ? 0x7fc0 : 0x7e00, wide = 0x7ff80000;
  switch (dtype) {
    case Dtype::uint8:
      return vectors ? f(Vector<uint32_t, 4>{}) : f(uint8_t{0});
    case Dtype::float32:
      return vectors ? f(Vector<uint32_t, 4>{{0x7fc00000, 0x7fc00000, 0x7fc00000, 0x7fc00000}})
                     : f(uint32_t{0x7fc00000});
    case Dtype::float64:
      return vectors ? f(Vector<uint32_t, 4>{{0, wide, 0, wide}}) : f(uint64_t{wide} << 32);
    default:
      const uint32_t both = half << 16 | half;
      return vectors ? f(Vector<uint32_t, 4>{{both, both, both, both}}) : f(static_cast<uint16_t>(half));
  }
}

// Whether vectors of `bytes` at multiples of `strides` elements from `data` are aligned as their type asks.
inline bool aligned(const void* data, int64_t bytes, int64_t element, std::initializer_list<int64_t> strides) {
  bytes = std::min<int64_t>(bytes, 16);
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         std::all_of(strides.begin(), strides.end(), [&](int64_t s) { return s * element % bytes == 0; });
}

// (B, K) ids in [0, length), or all of them in order. The values are the device's: a kernel checks them.
struct Ids {
  Ids(const Optional& ids, const Tensor& like, int64_t batch, int64_t length_) : length(length_) {
    STD_TORCH_CHECK(length < int64_t{1} << 31, "more than 2^31 places in a sample");
    rows = batch;
    per_sample = length;
    if (ids) {
      STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Long && ids->dim() == 2 && ids->size(0) == batch,
                      "ids must be int64 with a row for each sample");
      check_device("ids", *ids, like);
      all = false;
      data = static_cast<const int64_t*>(ids->const_data_ptr());
      row_stride = ids->stride(0);
      stride = ids->stride(1);
      per_sample = ids->size(1);
    }
    STD_TORCH_CHECK(rows * std::max(per_sample, length) < int64_t{1} << 31, "more than 2^31 rows");
  }

  __device__ int64_t at(int64_t b, int64_t k) const { return all ? k : data[b * row_stride + k * stride]; }
  __device__ bool has(int64_t id) const { return id >= 0 && id < length; }

  bool all = true;  // a list of none has no data either
  const int64_t* data = nullptr;
  int64_t row_stride = 0, stride = 0, rows, per_sample, length;
};

// Where ids name each place: the position k < K of place l of sample b, kNone, or kSeveral; and whether any id of the
// sample is bad.
constexpr int32_t kNone = -1, kSeveral = -2;

struct Inverse {
  __device__ int32_t at(int64_t b, int64_t l) const { return positions[b * length + l]; }
  // whether id k of sample b, which is `id`, is outside or not the only one of its value
  __device__ bool is_bad(int64_t b, int64_t id) const { return id < 0 || id >= length || at(b, id) == kSeveral; }

  int32_t* positions;
  int32_t* spoiled;  // (B)
  int64_t length;
};

struct Inverted {
  Tensor memory;  // what `inverse` points to
  Inverse inverse;
};

Inverted invert(const Ids& ids, const Tensor& like, const Device& device);

// Where each patch starts, in elements.
struct Places {
  __device__ int64_t at(int64_t b, uint32_t id) const {
    const uint32_t f = area.quotient(id), rest = id - f * area.divisor;
    const uint32_t r = cols.quotient(rest), c = rest - r * cols.divisor;
    return b * batch + f * frame + r * row + c * col;
  }

  int64_t batch, frame, row, col;  // strides
  Divider area, cols;              // patches of a frame, and of a row
};

// Images (B, C, H, W) or clips (B, C, T, H, W) as a grid of patches.
struct Grid {
  Grid(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const std::vector<int64_t>& patch) {
    const size_t rank = sizes.size(), h = rank - 2, w = rank - 1;
    STD_TORCH_CHECK((rank == 4 || rank == 5) && patch.size() == 3, "images must be (B, C, H, W) or (B, C, T, H, W)");
    const int64_t frames = rank == 5 ? sizes[2] : 1, frame_stride = rank == 5 ? strides[2] : 0;
    STD_TORCH_CHECK(std::all_of(patch.begin(), patch.end(), [](int64_t p) { return p > 0; }) &&
                        frames % patch[0] == 0 && sizes[h] % patch[1] == 0 && sizes[w] % patch[2] == 0,
                    "patch_size must divide the sides of images");
    batch = sizes[0];
    shape = {sizes[1], patch[0], patch[1], patch[2]};
    stride = {strides[1], frame_stride, strides[h], strides[w]};
    const int64_t rows = sizes[h] / patch[1], cols = sizes[w] / patch[2];
    length = frames / patch[0] * rows * cols;
    values = shape[0] * shape[1] * shape[2] * shape[3];
    STD_TORCH_CHECK(values < int64_t{1} << 30 && rows * cols < int64_t{1} << 31, "patches are too large");
    places = {strides[0],   patch[0] * frame_stride, patch[1] * strides[h], patch[2] * strides[w], Divider(rows * cols),
              Divider(cols)};
  }

  // strides of the values of a patch in the order (c, t, p, q), or (t, p, q, c)
  std::array<int64_t, 4> dense(bool channels_last) const {
    const auto& [c, t, p, q] = shape;
    if (channels_last)
      return {1, p * q * c, q * c, c};
    return {t * p * q, p * q, q, 1};
  }

  int64_t batch, length, values;
  std::array<int64_t, 4> shape, stride;  // of (c, t, p, q)
  Places places;
};

Grid grid_of(const Tensor& images, const std::vector<int64_t>& patch);

// The values of a patch on one side and on the other, in the order in which they lie on the first: strides are in
// elements.
struct Axes {
  Axes(const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& from, const std::array<int64_t, 4>& to);

  // Makes units of `n` elements that are adjacent and, from any of `places` of `data` on, aligned on the first side.
  bool widen_to(int n, const void* data, int64_t element, const Places& places);

  // places of unit u on both sides
  __device__ void at(uint32_t u, int64_t* from, int64_t* to) const {
    int64_t x = 0, y = 0;
#pragma unroll
    for (int a = 3; a > 0; --a) {
      if (a < rank) {
        const uint32_t rest = axis[a].size.quotient(u), i = u - rest * axis[a].size.divisor;
        x += i * axis[a].from;
        y += i * axis[a].to;
        u = rest;
      }
    }
    *from = x + u * axis[0].from;
    *to = y + u * axis[0].to;
  }

  struct Axis {
    Divider size;
    int64_t from, to;
  };
  Axis axis[4];  // outermost first
  int rank = 0;
  int64_t step = 1;    // between the elements of a unit, on the second side
  uint32_t units = 0;  // of a patch
};

// The patches that ids name, (B, K, P); `patches_embed.cu` multiplies them.
Tensor gather(const Tensor& images, const Optional& ids, const std::vector<int64_t>& patch, bool channels_last,
              const Optional& mean_std, ScalarType dtype);

}  // namespace sslkernels::patches
