// SPDX-License-Identifier: Apache-2.0
// Reading a patch: any dtype and strides in, dense values out. Included once for each instruction set by
// multiversion.inl, after leaf.inl.

// How a pixel becomes a value.
template <typename T>
struct Plain {
  template <typename S>
  __attribute__((always_inline)) T at(S x, i64) const {
    return static_cast<T>(widen(x));
  }
};

// x / 255 to the last bit. 0x10101 x / 2^24 is exact and falls short of it by a part in 2^24, more than half a spacing.
template <typename T>
struct Bytes {
  template <typename S>
  __attribute__((always_inline)) T at(S x, i64) const {
    return quotient(static_cast<T>(widen(x)));
  }
  __attribute__((always_inline)) static float quotient(float x) {
    const float below = x * (65793.0f / 16777216.0f);
    return below + below * (1.0f / 16777216.0f);
  }
  __attribute__((always_inline)) static double quotient(double x) { return x / 255; }
};

template <typename T>
struct Shifted {
  const T *shift, *factor;
  template <typename S>
  __attribute__((always_inline)) T at(S x, i64 c) const {
    return (static_cast<T>(widen(x)) - shift[c]) * factor[c];
  }
};

// n pixels in a row of one channel
template <typename S, typename T, typename F>
INLINE void read_row(const S* src, i64 src_stride, T* dst, i64 dst_stride, i64 n, i64 c, F value) {
  if (src_stride == 1 && dst_stride == 1) {
    if (n == 16) {
#pragma omp simd
      for (i64 i = 0; i < 16; ++i) dst[i] = value.at(src[i], c);
    } else {
#pragma omp simd
      for (i64 i = 0; i < n; ++i) dst[i] = value.at(src[i], c);
    }
  } else {
    for (i64 i = 0; i < n; ++i) dst[i * dst_stride] = value.at(src[i * src_stride], c);
  }
}

// n pixels in a row of three channels, next to each other (stride 3) or in planes (stride 1) on either side
template <int kSrc, int kDst, typename T, typename F>
INLINE void move_row3(const T* src, i64 src_channel, T* dst, i64 dst_channel, i64 n, F value) {
  const T *s1 = kSrc == 3 ? src + 1 : src + src_channel, *s2 = kSrc == 3 ? src + 2 : src + 2 * src_channel;
  T *d1 = kDst == 3 ? dst + 1 : dst + dst_channel, *d2 = kDst == 3 ? dst + 2 : dst + 2 * dst_channel;
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    const T a = value.at(src[kSrc * i], 0), b = value.at(s1[kSrc * i], 1), c = value.at(s2[kSrc * i], 2);
    dst[kDst * i] = a;
    d1[kDst * i] = b;
    d2[kDst * i] = c;
  }
}

// The same from any dtype: widened where it lies first, since shuffles of narrow elements are slow.
template <int kSrc, int kDst, typename S, typename T, typename F>
INLINE void read_row3(const S* src, i64 src_channel, T* dst, i64 dst_channel, i64 n, F value) {
  if constexpr (std::is_same_v<S, T>) {
    move_row3<kSrc, kDst>(src, src_channel, dst, dst_channel, n, value);
  } else {
    constexpr i64 kPixels = 64;
    T line[3 * kPixels];
    for (i64 at = 0; at < n; at += kPixels) {
      const i64 count = std::min(kPixels, n - at);
      if (kSrc == 3) {
        read_row(src + 3 * at, 1, line, 1, 3 * count, 0, Plain<T>{});
      } else {
        for (i64 c = 0; c < 3; ++c)
          read_row(src + c * src_channel + at, 1, line + c * kPixels, 1, count, c, Plain<T>{});
      }
      move_row3<kSrc, kDst>(line, kPixels, dst + kDst * at, dst_channel, count, value);
    }
  }
}

template <typename S, typename T, typename F>
INLINE void read_values(const S* src, const PatchShape& s, bool channels_last, T* dst, F value) {
  const i64 area = s.t * s.p * s.q, dst_channel = channels_last ? 1 : area, dst_q = channels_last ? s.channels : 1;
  const bool together = s.channels == 3 && s.channel_stride == 1 && s.q_stride == 3;
  if (together || (s.channels == 3 && s.q_stride == 1 && channels_last)) {
    for (i64 row = 0; row < s.t * s.p; ++row) {
      const S* from = src + row / s.p * s.t_stride + row % s.p * s.p_stride;
      T* to = dst + row * s.q * dst_q;
      if (!channels_last)
        read_row3<3, 1>(from, 1, to, area, s.q, value);
      else if (together)
        read_row3<3, 3>(from, 1, to, 1, s.q, value);
      else
        read_row3<1, 3>(from, s.channel_stride, to, 1, s.q, value);
    }
    return;
  }
  for (i64 c = 0; c < s.channels; ++c) {
    for (i64 t = 0; t < s.t; ++t) {
      const S* from = src + c * s.channel_stride + t * s.t_stride;
      T* to = dst + c * dst_channel + t * s.p * s.q * dst_q;
      for (i64 p = 0; p < s.p; ++p)
        read_row(from + p * s.p_stride, s.q_stride, to + p * s.q * dst_q, dst_q, s.q, c, value);
    }
  }
}

template <typename S, typename T>
INLINE void read_as(const void* src, const PatchShape& s, bool channels_last, T* dst, const T* shift, const T* factor) {
  const S* from = static_cast<const S*>(src);
  if (factor)
    read_values(from, s, channels_last, dst, Shifted<T>{shift, factor});
  else if constexpr (std::is_same_v<S, uint8_t>)
    read_values(from, s, channels_last, dst, Bytes<T>{});
  else
    read_values(from, s, channels_last, dst, Plain<T>{});
}

template <typename T>
LEAF void read_patch(const void* src, Dtype dtype, const PatchShape& s, bool channels_last, T* dst, const T* shift,
                     const T* factor) {
  switch (dtype) {
    case Dtype::kFloat:
      return read_as<float>(src, s, channels_last, dst, shift, factor);
    case Dtype::kDouble:
      return read_as<double>(src, s, channels_last, dst, shift, factor);
    case Dtype::kBFloat16:
      return read_as<BFloat16>(src, s, channels_last, dst, shift, factor);
    case Dtype::kHalf:
      return read_as<Half>(src, s, channels_last, dst, shift, factor);
    case Dtype::kByte:
      return read_as<uint8_t>(src, s, channels_last, dst, shift, factor);
  }
}
