// SPDX-License-Identifier: Apache-2.0
// Work that is linear in the features: unit rows, and the scores of pairs that a loss keeps out of its sweep.
#include "cpu/contrastive.h"

namespace sslkernels {

template <typename T>
Tensor positive_scores(const Tensor& q_tensor, const Tensor& k_tensor, T scale, i64 offset) {
  const Operand<T> q(q_tensor), k(k_tensor);
  Tensor out = empty({q.rows}, kScalar<T>);
  T* positive = data<T>(out);
  over_rows(q.rows, kFlopsAnElement * q.rows * q.cols, [&](Range rows) {
    Buffer<T> query(q.cols), key(q.cols);
    i64 ld;
    for (i64 i = rows.begin; i < rows.end; ++i) {
      const T* a = q.fetch(i, 1, query, &ld);
      positive[i] = scale * tiles<T>().dot(a, k.fetch((i + offset) % k.rows, 1, key, &ld), q.cols);
    }
  });
  return out;
}

template <typename T>
double add_positive_gradients(const Tensor& q_tensor, const Tensor& k_tensor, T scale, i64 offset, const T* grad, T* dq,
                              T* dk, bool self, bool want_scale) {
  const Operand<T> q(q_tensor), k(k_tensor);
  const i64 d = q.cols;
  // a key has one partner at most, so rows of dk are as disjoint as rows of dq
  over_rows(q.rows, kFlopsAnElement * q.rows * d, [&](Range rows) {
    Buffer<T> query(d), key(d);
    i64 ld;
    for (i64 i = rows.begin; i < rows.end; ++i) {
      const i64 j = (i + offset) % k.rows;
      if (dq)
        tiles<T>().axpy(dq + i * d, scale * (self ? grad[i] + grad[j] : grad[i]), k.fetch(j, 1, key, &ld), d);
      if (dk && !self)
        tiles<T>().axpy(dk + j * d, scale * grad[i], q.fetch(i, 1, query, &ld), d);
    }
  });
  if (!want_scale)
    return 0;
  const Tensor dots = positive_scores<T>(q_tensor, k_tensor, T(1), offset);
  double total = 0;
  for (i64 i = 0; i < q.rows; ++i) total += static_cast<double>(grad[i]) * data<T>(dots)[i];
  return total;
}

template <typename T>
UnitRows normalize_rows(const std::vector<Tensor>& xs, double eps) {
  const i64 d = xs[0].size(1);
  i64 total = 0;
  for (const Tensor& x : xs) total += x.size(0);
  Tensor z = empty({total, d}, kScalar<T>), norm = empty({total}, kScalar<T>);
  i64 first = 0;
  for (const Tensor& tensor : xs) {
    const Operand<T> x(tensor);
    T *out = data<T>(z) + first * d, *norms = data<T>(norm) + first;
    over_rows(x.rows, kFlopsAnElement * x.rows * d, [&](Range rows) {
      for (i64 i = rows.begin; i < rows.end; ++i) {
        T* row = out + i * d;
        x.load(i, 1, row, T(1));
        norms[i] = std::sqrt(tiles<T>().dot(row, row, d));
        // a square that overflows or underflows is taken again in double
        if (!(norms[i] > T(1e-15) && norms[i] < T(1e18))) {
          double sum = 0;
          for (i64 j = 0; j < d; ++j) sum += static_cast<double>(row[j]) * row[j];
          norms[i] = static_cast<T>(std::sqrt(sum));
        }
        tiles<T>().divide(row, std::max(norms[i], static_cast<T>(eps)), d);
      }
    });
    first += x.rows;
  }
  return {cast(z, xs[0]), norm};
}

template <typename T>
Tensor normalize_rows_backward(const Tensor& grad, const Tensor& z, const Tensor& norm, double eps, Range wanted) {
  const Operand<T> g(grad), unit(z);
  const i64 d = g.cols;
  Tensor out = empty({wanted.size(), d}, kScalar<T>);
  over_rows(wanted.size(), kFlopsAnElement * wanted.size() * d, [&](Range rows) {
    Buffer<T> scratch(d);
    i64 ld;
    for (i64 i = rows.begin; i < rows.end; ++i) {
      T* row = data<T>(out) + i * d;
      const T length = data<T>(norm)[wanted.begin + i];
      const T* direction = unit.fetch(wanted.begin + i, 1, scratch, &ld);
      g.load(wanted.begin + i, 1, row, T(1));
      // below eps the row is divided by a constant
      const bool clamped = length < static_cast<T>(eps);
      if (!clamped)
        tiles<T>().axpy(row, -tiles<T>().dot(row, direction, d), direction, d);
      tiles<T>().divide(row, clamped ? static_cast<T>(eps) : length, d);
    }
  });
  return out;
}

#define INSTANTIATE(T)                                                                                           \
  template Tensor positive_scores<T>(const Tensor&, const Tensor&, T, i64);                                      \
  template double add_positive_gradients<T>(const Tensor&, const Tensor&, T, i64, const T*, T*, T*, bool, bool); \
  template UnitRows normalize_rows<T>(const std::vector<Tensor>&, double);                                       \
  template Tensor normalize_rows_backward<T>(const Tensor&, const Tensor&, const Tensor&, double, Range);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

namespace {

std::tuple<Tensor, Tensor> l2_normalize(const std::vector<Tensor>& xs, double eps) {
  return with_type(xs[0], xs[0], [&](auto zero) {
    UnitRows out = normalize_rows<decltype(zero)>(xs, eps);
    return std::make_tuple(out.z, out.norm);
  });
}

Tensor l2_normalize_backward(const Tensor& grad, const Tensor& z, const Tensor& norm, double eps) {
  return with_type(z, z, [&](auto zero) {
    return cast(normalize_rows_backward<decltype(zero)>(grad, z, norm, eps, {0, z.size(0)}), z);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("l2_normalize", TORCH_BOX(&l2_normalize));
  library.impl("l2_normalize_backward", TORCH_BOX(&l2_normalize_backward));
}

}  // namespace sslkernels
