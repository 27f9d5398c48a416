// SPDX-License-Identifier: Apache-2.0
// Patches taken out of images, put back, and moved about.
#include "cpu/patches.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define SSLKERNELS_LEAVES "cpu/patches.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

template <typename T>
void Pixels<T>::read(const void* src, const PatchShape& shape, bool channels_last, T* dst) const {
  SSLKERNELS_AT_LEVEL(read_patch(src, dtype_, shape, channels_last, dst, shift_.data(), factor()));
}

void stream(const void* src, void* dst, i64 bytes) { SSLKERNELS_AT_LEVEL(stream_bytes(src, dst, bytes)); }

void finish_streams() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

template void Pixels<float>::read(const void*, const PatchShape&, bool, float*) const;
template void Pixels<double>::read(const void*, const PatchShape&, bool, double*) const;

namespace {

template <typename T>
void gather(const Grid& grid, const std::optional<Ids>& ids, bool channels_last, const Pixels<T>& pixels,
            const Tensor& out) {
  const i64 count = out.size(1), values = out.size(2), rows = grid.batch * count;
  const i64 bytes = static_cast<i64>(out.element_size());
  char* dst = static_cast<char*>(out.mutable_data_ptr());
  const bool past_caches = rows * values * bytes >= kStreamBytes;
  const bool same = out.scalar_type() == kScalar<T>, direct = same && !past_caches;
  const auto place = [&](i64 i) { return grid.at(i / count, ids ? (*ids)[i] : i % count); };
  over_rows(rows, kFlopsAnElement * rows * values, [&](Range mine) {
    Buffer<T> scratch(direct ? 0 : values);
    for (i64 i = mine.begin; i < mine.end; ++i) {
      char* row = dst + i * values * bytes;
      T* to = direct ? reinterpret_cast<T*>(row) : static_cast<T*>(scratch);
      pixels.read(place(i), grid.shape, channels_last, to);
      if (same && past_caches)
        stream(to, row, values * bytes);
      else if (!same)
        tiles<T>().store(to, row, kind(out), values, 1, values);
    }
    finish_streams();
  });
}

Tensor gather_patches(const Tensor& images, const Optional& ids, std::vector<i64> patch, bool channels_last,
                      const Optional& mean_std, ScalarType dtype) {
  const Grid grid(images, patch);
  std::optional<Ids> places;
  if (ids)
    places.emplace(*ids, grid.length, false);
  Tensor out = empty({grid.batch, places ? places->count : grid.length, grid.shape.values()}, dtype);
  with_type(grid.dtype == Dtype::kDouble || dtype == ScalarType::Double, [&](auto zero) {
    using T = decltype(zero);
    gather<T>(grid, places, channels_last, Pixels<T>(grid, mean_std), out);
  });
  return out;
}

// image += the values of one patch, by channel times factor
template <typename T>
void add_patch(const T* values, const PatchShape& s, bool channels_last, const T* factor, T* image) {
  const i64 area = s.t * s.p * s.q;
  const i64 channel = channels_last ? 1 : area, stride = channels_last ? s.channels : 1;
  for (i64 c = 0; c < s.channels; ++c) {
    const T slope = factor ? factor[c] : T(1);
    for (i64 t = 0; t < s.t; ++t) {
      for (i64 p = 0; p < s.p; ++p) {
        const T* from = values + c * channel + (t * s.p + p) * s.q * stride;
        T* to = image + c * s.channel_stride + t * s.t_stride + p * s.p_stride;
        for (i64 q = 0; q < s.q; ++q) to[q] += slope * from[q * stride];
      }
    }
  }
}

template <typename T>
Tensor scatter(const Tensor& grad, const std::optional<Ids>& ids, const Grid& grid, bool channels_last,
               const Pixels<T>& pixels, const Tensor& wide) {
  const i64 count = grad.size(1), values = grad.size(2);
  const i64 image = wide.numel() / std::max<i64>(grid.batch, 1), bytes = static_cast<i64>(grad.element_size());
  const char* src = static_cast<const char*>(grad.const_data_ptr());
  // a sample has one owner, so that patches named twice add up in their order
  run(grid.batch ? useful_threads(kFlopsAnElement * wide.numel()) : 0, [&](i64 t) {
    const i64 threads = useful_threads(kFlopsAnElement * wide.numel());
    Buffer<T> row(values);
    for (i64 b = grid.batch * t / threads; b < grid.batch * (t + 1) / threads; ++b) {
      std::fill_n(data<T>(wide) + b * image, image, T(0));
      for (i64 k = 0; k < count; ++k) {
        const i64 i = b * count + k;
        tiles<T>().load(src + bytes * (b * grad.stride(0) + k * grad.stride(1)), kind(grad), 0, grad.stride(2), row, 1,
                        values, T(1));
        T* to = reinterpret_cast<T*>(grid.at(b, ids ? (*ids)[i] : k));
        add_patch<T>(row, grid.shape, channels_last, pixels.factor(), to);
      }
    }
  });
  return wide;
}

Tensor gather_patches_backward(const Tensor& grad, const Optional& ids, std::vector<i64> shape, std::vector<i64> patch,
                               bool channels_last, const Optional& mean_std, ScalarType dtype) {
  return with_type(dtype == ScalarType::Double || kind(grad) == Dtype::kDouble, [&](auto zero) {
    using T = decltype(zero);
    const Tensor wide = empty(shape, kScalar<T>);
    const Grid grid(wide, patch);
    std::optional<Ids> places;
    if (ids)
      places.emplace(*ids, grid.length, false);
    scatter<T>(grad, places, grid, channels_last, Pixels<T>(grid, mean_std), wide);
    return wide.scalar_type() == dtype ? wide : torch::stable::to(wide, dtype);
  });
}

// dst[i * dst_stride] = src[i * src_stride]
template <typename Word>
void copy_patch(const void* src, const PatchShape& s, void* dst, const PatchShape& d) {
  for (i64 c = 0; c < s.channels; ++c) {
    for (i64 t = 0; t < s.t; ++t) {
      for (i64 p = 0; p < s.p; ++p) {
        const Word* from = static_cast<const Word*>(src) + c * s.channel_stride + t * s.t_stride + p * s.p_stride;
        Word* to = static_cast<Word*>(dst) + c * d.channel_stride + t * d.t_stride + p * d.p_stride;
        for (i64 q = 0; q < s.q; ++q) to[q] = from[q * s.q_stride];
      }
    }
  }
}

Tensor permute_patches(const Tensor& images, const Tensor& ids, std::vector<i64> patch, bool inverse) {
  const Grid from(images, patch);
  const Ids places(ids, from.length, true);
  STD_TORCH_CHECK(places.count == from.length, "ids must be a permutation of all patches");
  std::vector<i64> shape;
  for (i64 axis = 0; axis < images.dim(); ++axis) shape.push_back(images.size(axis));
  Tensor out = empty(shape, images.scalar_type());
  const Grid to(out, patch);
  const auto copy = from.bytes == 1   ? copy_patch<uint8_t>
                    : from.bytes == 2 ? copy_patch<uint16_t>
                    : from.bytes == 4 ? copy_patch<uint32_t>
                                      : copy_patch<uint64_t>;
  const i64 rows = from.batch * from.length;
  over_rows(rows, kFlopsAnElement * images.numel(), [&](Range mine) {
    for (i64 i = mine.begin; i < mine.end; ++i) {
      const i64 b = i / from.length, here = i % from.length, there = places[i];
      copy(from.at(b, inverse ? here : there), from.shape, to.at(b, inverse ? there : here), to.shape);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("gather_patches", TORCH_BOX(&gather_patches));
  library.impl("gather_patches_backward", TORCH_BOX(&gather_patches_backward));
  library.impl("permute_patches", TORCH_BOX(&permute_patches));
}

}  // namespace sslkernels
