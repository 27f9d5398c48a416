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
INLINE void read_row(const S* src, T* dst, i64 n, i64 c, F value) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) dst[i] = value.at(src[i], c);
}

// rows of one channel, of n pixels; both sides in planes
template <typename S, typename T, typename F>
INLINE void read_plane(const S* src, i64 src_row, T* dst, i64 rows, i64 n, i64 c, F value) {
  if (n == 16) {  // a known count is unrolled: the loads of many rows are under way at once
    for (i64 row = 0; row < rows; ++row) read_row(src + row * src_row, dst + row * 16, 16, c, value);
  } else {
    for (i64 row = 0; row < rows; ++row) read_row(src + row * src_row, dst + row * n, n, c, value);
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
        read_row(src + 3 * at, line, 3 * count, 0, Plain<T>{});
      } else {
        for (i64 c = 0; c < 3; ++c) read_row(src + c * src_channel + at, line + c * kPixels, count, c, Plain<T>{});
      }
      move_row3<kSrc, kDst>(line, kPixels, dst + kDst * at, dst_channel, count, value);
    }
  }
}

// rows of three channels, of n pixels
template <int kSrc, int kDst, typename S, typename T, typename F>
INLINE void read_plane3(const S* src, i64 src_row, i64 src_channel, T* dst, i64 dst_channel, i64 rows, i64 n, F value) {
  for (i64 row = 0; row < rows; ++row) {
    const S* from = src + row * src_row;
    T* to = dst + row * n * kDst;
    if (n == 16)
      read_row3<kSrc, kDst>(from, src_channel, to, dst_channel, 16, value);
    else
      read_row3<kSrc, kDst>(from, src_channel, to, dst_channel, n, value);
  }
}

template <typename S, typename T, typename F>
INLINE void read_values(const S* src, const PatchShape& s, bool channels_last, T* dst, F value) {
  const i64 plane = s.p * s.q, area = s.t * plane;
  const bool in_planes = s.q_stride == 1, together = s.channels == 3 && s.channel_stride == 1 && s.q_stride == 3;
  for (i64 t = 0; t < s.t; ++t) {
    const S* from = src + t * s.t_stride;
    T* to = dst + t * plane * (channels_last ? s.channels : 1);
    if (together && channels_last) {
      read_plane3<3, 3>(from, s.p_stride, 1, to, 1, s.p, s.q, value);
    } else if (together) {
      read_plane3<3, 1>(from, s.p_stride, 1, to, area, s.p, s.q, value);
    } else if (s.channels == 3 && in_planes && channels_last) {
      read_plane3<1, 3>(from, s.p_stride, s.channel_stride, to, 1, s.p, s.q, value);
    } else if (in_planes && !channels_last) {
      for (i64 c = 0; c < s.channels; ++c)
        read_plane(from + c * s.channel_stride, s.p_stride, to + c * area, s.p, s.q, c, value);
    } else {
      const i64 dst_c = channels_last ? 1 : area, dst_q = channels_last ? s.channels : 1;
      for (i64 c = 0; c < s.channels; ++c)
        for (i64 i = 0; i < plane; ++i)
          to[c * dst_c + i * dst_q] =
              value.at(from[c * s.channel_stride + i / s.q * s.p_stride + i % s.q * s.q_stride], c);
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

// Copies past the caches: a store to memory that nobody has read lately would fetch the line first. Needs a fence
// before another thread may look.
LEAF void stream_bytes(const void* src, void* dst, i64 bytes) {
#if defined(SSLKERNELS_MULTIVERSION)
  constexpr i64 kLine = 64;
  if (reinterpret_cast<uintptr_t>(dst) % kLine == 0 && bytes % kLine == 0) {
    const char* from = static_cast<const char*>(src);
    char* to = static_cast<char*>(dst);
    for (i64 i = 0; i < bytes; i += kLine) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
      for (i64 j = i; j < i + kLine; j += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + j),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
#endif
    }
    return;
  }
#endif
  std::memcpy(dst, src, bytes);
}
