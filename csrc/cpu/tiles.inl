// SPDX-License-Identifier: Apache-2.0
// The bodies of tiles.h. Included once for each instruction set by multiversion.inl, after leaf.inl.

// log(1 + e) for e in [0, 1], relatively exact for small e: 2 atanh(u) with u = e / (2 + e), a polynomial in u^2
INLINE float log1p_(float u) {
  const float v = u * u;
  float p = 1.22065339e-1f;
  p = p * v + 1.06966253e-1f;
  p = p * v + 1.43103612e-1f;
  p = p * v + 1.99993455e-1f;
  p = p * v + 3.33333397e-1f;
  p = p * v + 1.0f;
  return 2.0f * u * p;
}

INLINE double log1p_(double u) {
  const double v = u * u;
  double p = 8.044030768487919504e-2;
  p = p * v + 2.887544503882218869e-2;
  p = p * v + 5.050596095558247268e-2;
  p = p * v + 5.227222172704377873e-2;
  p = p * v + 5.885335973323093447e-2;
  p = p * v + 6.666497889545577445e-2;
  p = p * v + 7.692314198056124072e-2;
  p = p * v + 9.090908919623401797e-2;
  p = p * v + 1.111111111387327378e-1;
  p = p * v + 1.42857142856872233e-1;
  p = p * v + 2.00000000000001376e-1;
  p = p * v + 3.333333333333333306e-1;
  p = p * v + 1.0;
  return 2.0 * u * p;
}

template <typename T>
INLINE T finite_ref(T m) {
  return m == -std::numeric_limits<T>::infinity() ? T(0) : m;
}

template <typename T>
LEAF void exclude_groups(T* s, i64 ld, i64 rows, i64 cols, const int32_t* row_group, const int32_t* col_group,
                         bool differ) {
  const T none = -std::numeric_limits<T>::infinity();
  for (i64 i = 0; i < rows; ++i) {
    T* row = s + i * ld;
    const int32_t group = row_group[i];
    if (differ) {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) row[j] = col_group[j] != group ? none : row[j];
    } else {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) row[j] = col_group[j] == group ? none : row[j];
    }
  }
}

template <typename T>
LEAF void exclude_columns(T* s, i64 ld, i64 rows, i64 cols, const uint8_t* keep) {
  for (i64 i = 0; i < rows; ++i) {
    T* row = s + i * ld;
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) row[j] = keep[j] ? row[j] : -std::numeric_limits<T>::infinity();
  }
}

template <typename T>
LEAF void maxima(const T* s, i64 ld, i64 rows, i64 cols, T* row_max, T* col_max) {
  if (col_max) {
    for (i64 j = 0; j < cols; ++j) col_max[j] = -std::numeric_limits<T>::infinity();
  }
  for (i64 i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    T m = -std::numeric_limits<T>::infinity();
    if (col_max) {
#pragma omp simd reduction(max : m)
      for (i64 j = 0; j < cols; ++j) {
        const T x = row[j];
        m = x > m ? x : m;
        col_max[j] = x > col_max[j] ? x : col_max[j];
      }
    } else {
#pragma omp simd reduction(max : m)
      for (i64 j = 0; j < cols; ++j) m = row[j] > m ? row[j] : m;
    }
    row_max[i] = m;
  }
}

template <typename T>
LEAF void sum_exp(const T* s, i64 ld, i64 rows, i64 cols, T beta, T ref, T* row_sum, T* col_sum) {
  ref = finite_ref(ref);
  for (i64 j = 0; j < cols; ++j) col_sum[j] = 0;
  for (i64 i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < cols; ++j) {
      const T e = exp_((row[j] - ref) * beta);
      sum += e;
      col_sum[j] += e;
    }
    row_sum[i] = sum;
  }
}

template <typename T>
LEAF void sum_exp_rows(const T* s, i64 ld, i64 rows, i64 cols, T beta, const T* ref, T* row_sum) {
  for (i64 i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    const T m = finite_ref(ref[i]);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < cols; ++j) sum += exp_((row[j] - m) * beta);
    row_sum[i] = sum;
  }
}

template <typename T>
LEAF void sum_exp_cols(const T* s, i64 ld, i64 rows, i64 cols, T beta, const T* ref, T* col_sum) {
  for (i64 j = 0; j < cols; ++j) col_sum[j] = 0;
  for (i64 i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) col_sum[j] += exp_((row[j] - finite_ref(ref[j])) * beta);
  }
}

template <typename T>
LEAF void exp_rows(T* s, i64 ld, i64 rows, i64 cols, const T* ref, T* row_sum) {
  for (i64 i = 0; i < rows; ++i) {
    T* row = s + i * ld;
    const T m = finite_ref(ref[i]);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < cols; ++j) {
      const T e = exp_(row[j] - m);
      row[j] = e;
      sum += e;
    }
    row_sum[i] += sum;
  }
}

template <typename T>
LEAF void rebase(i64 n, T ref, const T* own, T* sum) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    const T moved = sum[i] * exp_(ref - own[i]);
    sum[i] = own[i] == -std::numeric_limits<T>::infinity() ? sum[i] : moved;
  }
}

template <typename T>
LEAF void merge(i64 n, T* max, T* sum, const T* tile_max, const T* tile_sum) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    const T m = tile_max[i] > max[i] ? tile_max[i] : max[i];
    const T ref = finite_ref(m);
    sum[i] = sum[i] * exp_(max[i] - ref) + tile_sum[i] * exp_(tile_max[i] - ref);
    max[i] = m;
  }
}

template <typename T>
LEAF void factors(i64 n, T ref, const T* lse, const T* weight, T weight_scale, T* out) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    const T e = weight[i] * weight_scale * exp_(ref - lse[i]);
    out[i] = lse[i] == -std::numeric_limits<T>::infinity() ? T(0) : e;
  }
}

template <typename T>
LEAF void weights(const T* s, i64 ld, T* w, i64 ldw, i64 rows, i64 cols, T beta, T ref, const T* row_factor,
                  const T* col_factor, bool add) {
  for (i64 i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    T* out = w + i * ldw;
    const T a = row_factor[i];
    if (add) {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) out[j] += exp_(row[j] * beta - ref) * (a + col_factor[j]);
    } else {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) out[j] = exp_(row[j] * beta - ref) * (a + col_factor[j]);
    }
  }
}

// w may be s itself: each element is read before it is written
template <typename T>
LEAF void weights_wide(const T* s, i64 ld, T* w, i64 ldw, i64 rows, i64 cols, T beta, const T* row_ref,
                       const T* row_factor, const T* col_ref, const T* col_factor, bool add) {
  for (i64 i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    T* out = w + i * ldw;
    const T a = row_factor ? row_factor[i] : T(0), m = row_factor ? finite_ref(row_ref[i]) : T(0);
    if (row_factor && col_factor) {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) {
        const T x = row[j] * beta;
        const T e = a * exp_(x - m) + col_factor[j] * exp_(x - finite_ref(col_ref[j]));
        out[j] = add ? out[j] + e : e;
      }
    } else if (row_factor) {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) {
        const T e = a * exp_(row[j] * beta - m);
        out[j] = add ? out[j] + e : e;
      }
    } else {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) {
        const T e = col_factor[j] * exp_(row[j] * beta - finite_ref(col_ref[j]));
        out[j] = add ? out[j] + e : e;
      }
    }
  }
}

template <typename T>
LEAF void softplus(const T* s, i64 ld, i64 rows, i64 cols, T bias, T* row_sum) {
  for (i64 i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < cols; ++j) {
      const T x = row[j] + bias;
      const T e = exp_(x > 0 ? -x : x);
      sum += (x > 0 ? x : T(0)) + log1p_(e / (2 + e));
    }
    row_sum[i] += sum;
  }
}

template <typename T>
LEAF void softplus_weights(T* s, i64 ld, i64 rows, i64 cols, T bias, const T* weight, T* row_sum, T* weight_sum) {
  for (i64 i = 0; i < rows; ++i) {
    T* row = s + i * ld;
    const T a = weight[i];
    T sum = 0, total = 0;
#pragma omp simd reduction(+ : sum, total)
    for (i64 j = 0; j < cols; ++j) {
      const T x = row[j] + bias;
      const T e = exp_(x > 0 ? -x : x);
      const T inverse = 1 / ((1 + e) * (2 + e));  // one division for both quotients
      sum += (x > 0 ? x : T(0)) + log1p_(e * (1 + e) * inverse);
      const T w = a * (x > 0 ? T(1) : e) * (2 + e) * inverse;
      row[j] = w;
      total += w;
    }
    row_sum[i] += sum;
    weight_sum[i] += total;
  }
}

template <typename T>
LEAF void add(T* dst, i64 ldd, const T* src, i64 lds, i64 rows, i64 cols) {
  for (i64 i = 0; i < rows; ++i) {
    T* d = dst + i * ldd;
    const T* x = src + i * lds;
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) d[j] += x[j];
  }
}

template <typename T>
LEAF void scale_rows(T* dst, i64 ldd, const T* src, i64 lds, const T* factor, i64 rows, i64 cols) {
  for (i64 i = 0; i < rows; ++i) {
    T* d = dst + i * ldd;
    const T* x = src + i * lds;
    const T a = factor[i];
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) d[j] = a * x[j];
  }
}

template <typename T>
LEAF void divide(T* x, T divisor, i64 n) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) x[j] /= divisor;
}

template <typename T>
LEAF T dot(const T* a, const T* b, i64 n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

template <typename T>
LEAF void axpy(T* y, T a, const T* x, i64 n) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) y[j] += a * x[j];
}

template <typename S, typename T>
INLINE void load_as(const void* data, i64 row_stride, i64 col_stride, T* dst, i64 rows, i64 cols, T factor) {
  const S* src = static_cast<const S*>(data);
  for (i64 i = 0; i < rows; ++i) {
    const S* row = src + i * row_stride;
    T* out = dst + i * cols;
    if (col_stride == 1) {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) out[j] = factor * T(widen(row[j]));
    } else {
      for (i64 j = 0; j < cols; ++j) out[j] = factor * T(widen(row[j * col_stride]));
    }
  }
}

template <typename T>
LEAF void load(const void* src, Dtype dtype, i64 row_stride, i64 col_stride, T* dst, i64 rows, i64 cols, T factor) {
  switch (dtype) {
    case Dtype::kFloat:
      return load_as<float>(src, row_stride, col_stride, dst, rows, cols, factor);
    case Dtype::kDouble:
      return load_as<double>(src, row_stride, col_stride, dst, rows, cols, factor);
    case Dtype::kBFloat16:
      return load_as<BFloat16>(src, row_stride, col_stride, dst, rows, cols, factor);
    case Dtype::kHalf:
      return load_as<Half>(src, row_stride, col_stride, dst, rows, cols, factor);
    case Dtype::kByte:
      return load_as<uint8_t>(src, row_stride, col_stride, dst, rows, cols, factor);
  }
}

template <typename S, typename T>
INLINE void store_as(const T* src, void* data, i64 row_stride, i64 rows, i64 cols) {
  for (i64 i = 0; i < rows; ++i) {
    const T* row = src + i * cols;
    S* out = static_cast<S*>(data) + i * row_stride;
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) narrow(row[j], out + j);
  }
}

template <typename T>
LEAF void store(const T* src, void* dst, Dtype dtype, i64 row_stride, i64 rows, i64 cols) {
  switch (dtype) {
    case Dtype::kFloat:
      return store_as<float>(src, dst, row_stride, rows, cols);
    case Dtype::kDouble:
      return store_as<double>(src, dst, row_stride, rows, cols);
    case Dtype::kBFloat16:
      return store_as<BFloat16>(src, dst, row_stride, rows, cols);
    case Dtype::kHalf:
      return store_as<Half>(src, dst, row_stride, rows, cols);
    case Dtype::kByte:
      return;  // features are never rounded to bytes
  }
}

template <typename T>
LEAF void exp_all(const T* x, T* out, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) out[i] = exp_(x[i]);
}

template <typename T>
constexpr Tiles<T> table() {
  return {exclude_groups<T>,
          exclude_columns<T>,
          maxima<T>,
          sum_exp<T>,
          sum_exp_rows<T>,
          sum_exp_cols<T>,
          exp_rows<T>,
          rebase<T>,
          merge<T>,
          factors<T>,
          weights<T>,
          weights_wide<T>,
          softplus<T>,
          softplus_weights<T>,
          add<T>,
          scale_rows<T>,
          divide<T>,
          dot<T>,
          axpy<T>,
          load<T>,
          store<T>,
          exp_all<T>};
}
