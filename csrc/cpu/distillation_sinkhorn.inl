// SPDX-License-Identifier: Apache-2.0
// Loops of Sinkhorn-Knopp over pieces of rows. Included once for each instruction set by multiversion.inl.

// exp(d / epsilon), within 2^-100, so that no product is a denormal, on which processors stall, and 2^120, where a sum
// shows that it needs a shift. log2(e) / epsilon has two parts, so that with an FMA the argument is not rounded before
// its whole part is gone. Relative error below 3e-7.
INLINE float decay(float d, const Rate<float>& rate) {
  d = d < rate.least ? rate.least : d;
  d = d > rate.most ? rate.most : d;
  const float t = d * rate.high + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the whole part
  const float r = (d * rate.high - (t - 12582912.0f)) + d * rate.low;
  float p = 1.326472721e-3f;
  p = p * r + 9.671512812e-3f;
  p = p * r + 5.550733745e-2f;
  p = p * r + 2.402224208e-1f;
  p = p * r + 6.931469776e-1f;
  p = p * r + 1.0f;
  return p * bits<float>((bits<uint32_t>(t) << 23) + 0x3f800000u);
}

INLINE double decay(double d, const Rate<double>& rate) { return exp_((d > rate.most ? rate.most : d) * rate.high); }

// The same, but 0 where it would stay.
INLINE float vanishing_decay(float d, const Rate<float>& rate) {
  const float e = decay(d, rate);
  return d < rate.least ? 0.0f : e;
}

INLINE double vanishing_decay(double d, const Rate<double>& rate) { return decay(d, rate); }

// log(x) of a positive normal number; NaN stays NaN. Relative error below 2e-7, absolute near x = 1.
INLINE float log_(float x) {
  const uint32_t u = bits<uint32_t>(x) - 0x3f3504f3u;  // sqrt(1/2): the mantissa lies between that and sqrt(2)
  const float exponent = static_cast<float>(static_cast<int32_t>(u) >> 23);
  const float m = bits<float>((u & 0x007fffffu) + 0x3f3504f3u), v = (m - 1) / (m + 1), w = v * v;
  const float p = (((w / 9 + 1.0f / 7) * w + 1.0f / 5) * w + 1.0f / 3) * w + 1;
  return (exponent * 6.93147181e-1f + 2 * v * p) + (x - x);
}

INLINE double log_(double x) { return std::log(x); }

// highest_j = the largest of the scores so far, sum_j = sum of exp((score - highest_j) / epsilon)
template <i64 count, typename T>
INLINE void add_rows(const T* x, i64 ld, i64 cols, const Rate<T>& rate, T* highest, T* sum) {
#pragma omp simd
  for (i64 j = 0; j < cols; ++j) {
    T m = highest[j];
    for (i64 i = 0; i < count; ++i) m = x[i * ld + j] > m ? x[i * ld + j] : m;
    const T ref = m == -std::numeric_limits<T>::infinity() ? T(0) : m;  // -inf - -inf is not what comes next
    T added = 0;
    for (i64 i = 0; i < count; ++i) added += vanishing_decay(x[i * ld + j] - ref, rate);
    sum[j] = sum[j] * decay(highest[j] - ref, rate) + added;
    highest[j] = m;
  }
}

template <typename T>
LEAF void column_sums(const T* x, i64 ld, i64 rows, i64 cols, const Rate<T>& rate, T* highest, T* sum) {
  i64 i = 0;
  for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce) add_rows<kRowsAtOnce>(x + i * ld, ld, cols, rate, highest, sum);
  for (; i < rows; ++i) add_rows<1>(x + i * ld, ld, cols, rate, highest, sum);
}

// e_j = exp((x_j - center_j - shift) / epsilon); its sum
template <typename T>
LEAF T weigh(const T* x, const T* center, i64 n, const Rate<T>& rate, T shift, T* e) {
  T s = 0;
#pragma omp simd reduction(+ : s)
  for (i64 j = 0; j < n; ++j) {
    e[j] = vanishing_decay((x[j] - center[j]) - shift, rate);
    s += e[j];
  }
  return s;
}

// share_j += inverse_i e_ij, of the rows before; then e_ij as above for `count` rows of x, and its sums
template <i64 count, typename T>
INLINE void share_and_weigh(const T* x, i64 ld, const T* center, i64 n, const Rate<T>& rate, T* e, i64 lde,
                            const T* inverse, T* share, T* sum) {
  static_assert(count <= kRowsShared && kRowsShared == 4, "");
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (i64 j = 0; j < n; ++j) {
    const T c = center[j];
    T add = share[j], v[kRowsShared] = {0, 0, 0, 0};
    for (i64 i = 0; i < count; ++i) {
      add += inverse[i] * e[i * lde + j];
      v[i] = decay(x[i * ld + j] - c, rate);
      e[i * lde + j] = v[i];
    }
    s0 += v[0];
    s1 += v[1];
    s2 += v[2];
    s3 += v[3];
    share[j] = add;
  }
  sum[0] = s0;
  sum[1] = s1;
  sum[2] = s2;
  sum[3] = s3;
}

template <typename T>
LEAF void share_and_weigh(const T* x, i64 ld, i64 rows, const T* center, i64 n, const Rate<T>& rate, T* e, i64 lde,
                          const T* inverse, T* share, T* sum) {
  switch (rows) {
    case 4:
      return share_and_weigh<4>(x, ld, center, n, rate, e, lde, inverse, share, sum);
    case 3:
      return share_and_weigh<3>(x, ld, center, n, rate, e, lde, inverse, share, sum);
    case 2:
      return share_and_weigh<2>(x, ld, center, n, rate, e, lde, inverse, share, sum);
    default:
      return share_and_weigh<1>(x, ld, center, n, rate, e, lde, inverse, share, sum);
  }
}

// out_ij = inverse_i e_ij, of the rows before; then e_ij as above for `count` rows of x, and its sums
template <i64 count, typename T>
INLINE void write_and_weigh(const T* x, i64 ld, const T* center, i64 n, const Rate<T>& rate, T* e, i64 lde,
                            const T* inverse, T* out, T* sum) {
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (i64 j = 0; j < n; ++j) {
    const T c = center[j];
    T v[kRowsShared] = {0, 0, 0, 0};
    for (i64 i = 0; i < count; ++i) {
      out[i * lde + j] = inverse[i] * e[i * lde + j];
      v[i] = vanishing_decay(x[i * ld + j] - c, rate);
      e[i * lde + j] = v[i];
    }
    s0 += v[0];
    s1 += v[1];
    s2 += v[2];
    s3 += v[3];
  }
  sum[0] = s0;
  sum[1] = s1;
  sum[2] = s2;
  sum[3] = s3;
}

template <typename T>
LEAF void write_and_weigh(const T* x, i64 ld, i64 rows, const T* center, i64 n, const Rate<T>& rate, T* e, i64 lde,
                          const T* inverse, T* out, T* sum) {
  switch (rows) {
    case 4:
      return write_and_weigh<4>(x, ld, center, n, rate, e, lde, inverse, out, sum);
    case 3:
      return write_and_weigh<3>(x, ld, center, n, rate, e, lde, inverse, out, sum);
    case 2:
      return write_and_weigh<2>(x, ld, center, n, rate, e, lde, inverse, out, sum);
    default:
      return write_and_weigh<1>(x, ld, center, n, rate, e, lde, inverse, out, sum);
  }
}

template <typename T>
LEAF T largest(const T* x, const T* center, i64 n) {
  T m = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : m)
  for (i64 j = 0; j < n; ++j) {
    const T d = x[j] - center[j];
    m = d > m ? d : m;
  }
  return m;
}

// into += from, from = 0
template <typename T>
LEAF void move_sums(i64 n, T* from, T* into) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) {
    into[j] += from[j];
    from[j] = 0;
  }
}

// center_j += epsilon log(ratio share_j)
template <typename T>
LEAF void recenter(i64 n, const T* share, T ratio, T epsilon, T* center) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) center[j] += epsilon * log_(ratio * share[j]);
}
