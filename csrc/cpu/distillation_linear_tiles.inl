// SPDX-License-Identifier: Apache-2.0
// Loops over the part of a row of logits that lies in one tile. Included once for each instruction set.

// NaN is passed over here and shows in the sums
template <typename T>
LEAF T largest(const T* x, i64 n) {
  T m = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : m)
  for (i64 j = 0; j < n; ++j) m = x[j] > m ? x[j] : m;
  return m;
}

template <typename T>
LEAF void subtract(T* x, const T* center, T factor, i64 n) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) x[j] -= factor * center[j];
}

// sum exp(x - ref)
template <typename T>
LEAF T sum_exponentials(const T* x, i64 n, T ref) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) sum += exp_(x[j] - ref);
  return sum;
}

// e = factor exp(x - ref). A log-sum-exp in place of ref would be rounded, and with it all of the row.
template <typename T>
LEAF void exponentials(const T* x, i64 n, T ref, T factor, T* e) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) e[j] = factor * exp_(x[j] - ref);
}

// out += x
template <typename T>
LEAF void add(T* out, const T* x, i64 n) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) out[j] += x[j];
}

template <typename T>
LEAF T total(const T* x, i64 n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) sum += x[j];
  return sum;
}

template <bool keep, typename T>
INLINE T compare_as(T* x, const T* p, i64 n, T ref, T* dot) {
  T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (i64 j = 0; j < n; ++j) {
    const T d = x[j] - ref, e = exp_(d);
    sum += e;
    along -= p[j] * d;
    if (keep)
      x[j] = e;
  }
  *dot = along;
  return sum;
}

// sum exp(x - ref), and dot = sum p (ref - x); `keep` leaves the exponentials in place of x
template <typename T>
LEAF T compare(T* x, const T* p, i64 n, T ref, bool keep, T* dot) {
  return keep ? compare_as<true>(x, p, n, ref, dot) : compare_as<false>(x, p, n, ref, dot);
}

// x = a exp(x - ref) - b p; the sum
template <typename T>
LEAF T slopes(T* x, const T* p, i64 n, T ref, T a, T b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) {
    const T slope = a * exp_(x[j] - ref) - b * p[j];
    x[j] = slope;
    sum += slope;
  }
  return sum;
}
