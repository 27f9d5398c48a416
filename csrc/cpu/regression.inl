// SPDX-License-Identifier: Apache-2.0
// Loops of the regression kernels over one row, and over a tile of layers. Included once for each instruction set.
#include "cpu/columns.inl"

// x standardised is ((x - mean) - rest) * inverse: the mean of a row far from zero is rounded, and rest is what is
// left.
template <typename T>
struct Standard {
  T mean, rest, inverse;
};

// sum_j f(j)
template <typename T, typename F>
INLINE T sum_over(i64 n, const F& f) {
  T s = 0;
#pragma omp simd reduction(+ : s)
  for (i64 j = 0; j < n; ++j) s += f(j);
  return s;
}

template <typename T>
INLINE Standard<T> standard(const T* x, i64 n, T eps) {
  const T mean = sum_over<T>(n, [x](i64 j) { return x[j]; }) / n;
  const i64 q = n / 2;
  T r0 = 0, r1 = 0, s0 = 0, s1 = 0;
#pragma omp simd reduction(+ : r0, r1, s0, s1)
  for (i64 j = 0; j < q; ++j) {
    const T c = x[j] - mean, d = x[j + q] - mean;
    r0 += c;
    r1 += d;
    s0 += c * c;
    s1 += d * d;
  }
  const T odd = n % 2 ? x[n - 1] - mean : T(0);
  const T rest = (r0 + r1 + odd) / n, variance = (s0 + s1 + odd * odd) / n - rest * rest;
  return {mean, rest, 1 / std::sqrt((variance < 0 ? T(0) : variance) + eps)};
}

// The mean of value(d) over the elements, d = p - standardised t, and slope(d) into grad unless that is null.
template <typename T, typename V, typename S>
INLINE T elements(const T* p, const T* t, i64 n, const Standard<T>& s, T* grad, const V& value, const S& slope) {
  const auto difference = [=](i64 j) { return p[j] - ((t[j] - s.mean) - s.rest) * s.inverse; };
  if (!grad)
    return sum_over<T>(n, [=](i64 j) { return value(difference(j)); }) / n;
  return sum_over<T>(n,
                     [=](i64 j) {
                       const T d = difference(j);
                       grad[j] = slope(d);
                       return value(d);
                     }) /
         n;
}

template <typename T>
INLINE T length(const T* x, i64 n) {
  const T sum = sum_over<T>(n, [x](i64 j) { return x[j] * x[j]; });
  if (sum > T(1e-30) && sum < T(1e36))
    return std::sqrt(sum);
  double wide = 0;  // a square that overflows or underflows in float
  for (i64 j = 0; j < n; ++j) wide += static_cast<double>(x[j]) * x[j];
  return static_cast<T>(std::sqrt(wide));
}

// q = p, or p scaled to unit length where squares would leave the range; e = q - ratio t; sums of e^2 and of e q
template <bool scaled, typename T>
INLINE void differences(const T* p, const T* t, i64 n, T scale, T ratio, T* square, T* along) {
  T s = 0, k = 0;
#pragma omp simd reduction(+ : s, k)
  for (i64 j = 0; j < n; ++j) {
    const T q = scaled ? p[j] * scale : p[j], e = q - t[j] * ratio;
    s += e * e;
    k += e * q;
  }
  *square = s;
  *along = k;
}

template <bool scaled, typename T>
INLINE void slopes(const T* p, const T* t, i64 n, T scale, T ratio, T share, T factor, T* grad) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) {
    const T q = scaled ? p[j] * scale : p[j];
    grad[j] = factor * ((q - t[j] * ratio) - share * q);
  }
}

// 1 - <u, v> or |u - v|^2 of the unit rows u and v, from their difference, which does not cancel as v nears u. The
// difference is that of p and t stretched to p's length: with an FMA it is rounded once, and an error of the lengths
// has nearly the direction of p, which the gradient has not.
template <typename T>
INLINE T directions(const T* p, const T* t, i64 n, T eps, bool cosine, T weight, T* grad) {
  const T length_p = length(p, n), length_t = length(t, n);
  const bool constant = length_p < eps;  // below eps the divisor is one
  const T own = constant ? eps : length_p, other = length_t < eps ? eps : length_t;
  const bool sane = own > T(1e-15) && own < T(1e15) && other > T(1e-15) && other < T(1e15);
  const T scale = sane ? T(1) : 1 / own, ratio = sane ? own / other : 1 / other, unit = sane ? 1 / own : T(1);
  T square, along;
  if (sane)
    differences<false>(p, t, n, scale, ratio, &square, &along);
  else
    differences<true>(p, t, n, scale, ratio, &square, &along);
  const T distance = square * unit * unit, u = length_p / own, v = length_t / other;
  const T angle = T(0.5) * (distance + (constant ? 1 - u * u : T(0)) + (length_t < eps ? 1 - v * v : T(0)));
  if (grad) {
    // d/dp = (u - v - (1 - <u, v>) u) / |p|; where the divisor is constant -v / eps, or (u - v) / eps
    const T share = constant ? (cosine ? T(1) : T(0)) : along * unit * unit;
    const T factor = (cosine ? 1 : 2) * weight * unit / own;
    if (sane)
      slopes<false>(p, t, n, scale, ratio, share, factor, grad);
    else
      slopes<true>(p, t, n, scale, ratio, share, factor, grad);
  }
  return cosine ? angle : distance;
}

// The value of one row and, unless grad is null, weight * its gradient.
template <typename T>
LEAF T regress(const Regression<T>& r, const T* p, const T* t, i64 n, T weight, T* grad) {
  if (r.distance == Distance::kCosine || r.distance == Distance::kNormalizedL2)
    return directions(p, t, n, r.eps, r.distance == Distance::kCosine, weight, grad);
  const Standard<T> s = r.normalize_target ? standard(t, n, r.eps) : Standard<T>{0, 0, 1};
  const T w = weight / n;
  if (r.distance == Distance::kL2)
    return elements(p, t, n, s, grad, [](T d) { return d * d; }, [w](T d) { return 2 * w * d; });
  if (r.distance == Distance::kL1)
    return elements(
        p, t, n, s, grad, [](T d) { return d < 0 ? -d : d; }, [w](T d) { return d > 0   ? w
                                                                                : d < 0 ? -w
                                                                                        : d; });
  const T beta = r.beta, half = T(0.5), steep = w / beta;
  return elements(
             p, t, n, s, grad,
             [beta, half](T d) {
               const T far = d < 0 ? -d : d, near = far < beta ? far : beta;
               return near * (far - half * near);
             },
             [beta, steep](T d) {
               return steep * (d > beta ? beta : d < -beta ? -beta : d);
             }) /
         beta;
}

template <typename T>
LEAF void layer_norm(T* x, i64 n, T eps) {
  const Standard<T> s = standard(x, n, eps);
#pragma omp simd
  for (i64 j = 0; j < n; ++j) x[j] = ((x[j] - s.mean) - s.rest) * s.inverse;
}

// out (+)= factor (x standardised over its rows), for a tile of columns; scratch: 5 cols doubles
template <typename T>
LEAF void add_standardized(const T* x, i64 ld, i64 rows, i64 cols, T eps, T factor, double* scratch, bool first, T* out,
                           i64 ldo) {
  double *rest = scratch, *variance = scratch + cols;
  T *mean = reinterpret_cast<T*>(scratch + 2 * cols), *inverse = mean + cols, *rest_of = inverse + cols;
  column_statistics(x, ld, rows, cols, mean, rest, variance);
  for (i64 j = 0; j < cols; ++j) {
    rest_of[j] = static_cast<T>(rest[j]);
    inverse[j] = static_cast<T>(factor / std::sqrt(variance[j] + eps));
  }
  for (i64 i = 0; i < rows; ++i) {
    const T* row = x + i * ld;
    T* o = out + i * ldo;
    if (first) {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) o[j] = ((row[j] - mean[j]) - rest_of[j]) * inverse[j];
    } else {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) o[j] += ((row[j] - mean[j]) - rest_of[j]) * inverse[j];
    }
  }
}

template <typename T>
LEAF void add_scaled(const T* x, i64 ld, i64 rows, i64 cols, T factor, bool first, T* out, i64 ldo) {
  for (i64 i = 0; i < rows; ++i) {
    const T* row = x + i * ld;
    T* o = out + i * ldo;
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) o[j] = first ? factor * row[j] : o[j] + factor * row[j];
  }
}
