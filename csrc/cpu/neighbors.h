// SPDX-License-Identifier: Apache-2.0
// What the searches for neighbours share; what they compute is defined in sslkernels/reference/neighbors.py.
#pragma once

#include <string>

#include "cpu/operand.h"

namespace sslkernels {

enum class Metric { kL2, kDot, kCosine };

inline Metric metric_of(const std::string& name) {
  return name == "l2" ? Metric::kL2 : name == "dot" ? Metric::kDot : Metric::kCosine;
}

constexpr i64 kGroup = 16, kWide = 64;  // scores that a search looks at together
constexpr double kCosineEps = 1e-12;    // the reference's

template <typename T>
T length(const T* x, i64 d) {
  const T squares = tiles<T>().dot(x, x, d);
  // squares that overflow or underflow are taken again in double
  if (squares > T(1e-30) && squares < T(1e36))
    return std::sqrt(squares);
  double sum = 0;
  for (i64 j = 0; j < d; ++j) sum += static_cast<double>(x[j]) * x[j];
  return static_cast<T>(std::sqrt(sum));
}

// Where l2 is counted from, (D): the median of a sample of rows unless the origin is nearly as close to them.
template <typename T>
std::vector<T> centre_of(const Operand<T>& x) {
  constexpr i64 kSample = 31;
  const i64 d = x.cols, step = (x.rows + kSample - 1) / kSample, count = (x.rows + step - 1) / step;
  std::vector<T> sample(count * d), centre(d), column, near, far;
  for (i64 i = 0; i < count; ++i) x.load(i * step, 1, sample.data() + i * d, T(1));
  const auto median = [](std::vector<T>& values) {
    values.erase(std::remove_if(values.begin(), values.end(), [](T v) { return std::isnan(v); }), values.end());
    if (values.empty())
      return std::numeric_limits<T>::quiet_NaN();
    const auto middle = values.begin() + (values.size() - 1) / 2;
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
  };
  for (i64 j = 0; j < d; ++j) {
    column.clear();
    for (i64 i = 0; i < count; ++i) column.push_back(sample[i * d + j]);
    const T m = median(column);
    centre[j] = std::isfinite(m) ? m : T(0);
  }
  for (i64 i = 0; i < count; ++i) {
    T* row = sample.data() + i * d;
    far.push_back(tiles<T>().dot(row, row, d));
    tiles<T>().axpy(row, T(-1), centre.data(), d);
    near.push_back(tiles<T>().dot(row, row, d));
  }
  if (!(4 * median(near) <= median(far)))
    std::fill(centre.begin(), centre.end(), T(0));
  return centre;
}

// The rows of one side as the products take them: the largest <q, k> - bias_k is the best.
template <typename T>
class Side {
 public:
  // `centre` is for l2, null otherwise; only keys are brought to unit length, as a query's length changes no choice.
  Side(const Tensor& x, Metric metric, const T* centre, bool keys)
      : rows(x), metric_(metric == Metric::kCosine && !keys ? Metric::kDot : metric), centre_(centre) {}

  // Rows [first, first + count), in place or in `scratch`, and the bias of each.
  const T* fetch(i64 first, i64 count, T* scratch, i64* ld, T* bias) const {
    std::fill_n(bias, count, T(0));
    if (metric_ == Metric::kDot)
      return rows.fetch(first, count, scratch, ld);
    const i64 d = *ld = rows.cols;
    rows.load(first, count, scratch, T(1));
    for (i64 i = 0; i < count; ++i) {
      T* row = scratch + i * d;
      if (metric_ == Metric::kCosine) {
        tiles<T>().divide(row, std::max(length(row, d), static_cast<T>(kCosineEps)), d);
        continue;
      }
      tiles<T>().axpy(row, T(-1), centre_, d);
      bias[i] = tiles<T>().dot(row, row, d) / 2;
      if (bias[i] == std::numeric_limits<T>::infinity())
        std::fill_n(row, d, T(0));
    }
    return scratch;
  }

  // Whether `fetch` needs no scratch.
  bool in_place() const { return metric_ == Metric::kDot && rows.direct(); }

  const Operand<T> rows;

 private:
  Metric metric_;
  const T* centre_;
};

}  // namespace sslkernels
