// SPDX-License-Identifier: Apache-2.0
// The correlation ops as the dispatcher calls them: what each makes of the columns' moments and of the norm of C.
#include "cpu/correlation.h"

namespace sslkernels {

namespace {

// The gradients that are wanted, dense in the precision of the arithmetic; the others are empty.
template <typename T>
struct Gradients {
  Gradients(const Tensor& x, const Optional& y, const std::vector<bool>& wanted)
      : x(tensor(x, wanted[0])), y(y ? tensor(*y, wanted[1]) : empty({0}, kScalar<T>)) {
    out.push_back(wanted[0] ? data<T>(this->x) : nullptr);
    if (y)
      out.push_back(wanted[1] ? data<T>(this->y) : nullptr);
  }

  static Tensor tensor(const Tensor& x, bool wanted) {
    return empty(wanted ? std::vector<i64>{x.size(0), x.size(1)} : std::vector<i64>{0}, kScalar<T>);
  }

  Tensor x, y;
  std::vector<T*> out;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> results(double value, const Gradients<T>& gradients) {
  Tensor result = empty({}, kScalar<T>);
  *data<T>(result) = static_cast<T>(value);
  return {result, gradients.x, gradients.y};
}

std::tuple<Tensor, Tensor, Tensor> product_frobenius(const Tensor& a, const Optional& b, bool off_diagonal,
                                                     std::vector<bool> wanted) {
  return with_type(a, b ? *b : a, [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> gradients(a, b, wanted);
    if (a.numel() == 0 || (b && b->numel() == 0)) {
      for (const Tensor& x : {gradients.x, gradients.y}) std::fill_n(data<T>(x), x.numel(), T(0));
      return results(0, gradients);
    }
    std::vector<Batch<T>> sides{Batch<T>(a)};
    if (b)
      sides.emplace_back(*b);
    const Product<T> product(std::move(sides), b.has_value(), !off_diagonal, false, gradients.out);
    Slopes<T> slopes{b ? T(2) : T(4), {}, T(0)};
    if (off_diagonal)
      slopes.diagonal.assign(b ? 2 : 1, std::vector<T>(a.size(1), T(0)));
    return results(product.norm(slopes), gradients);
  });
}

std::tuple<Tensor, Tensor, Tensor> two_view_correlation(const Tensor& x, const Tensor& y, double lambda, double eps,
                                                        std::vector<bool> wanted) {
  return with_type(x, y, [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> gradients(x, y, wanted);
    const i64 d = x.size(1);
    const double n = static_cast<double>(x.size(0));
    const Product<T> product({Batch<T>(x, Columns::kStandardized, eps, false),  //
                              Batch<T>(y, Columns::kStandardized, eps, false)},
                             true, false, false, gradients.out);
    std::vector<T> diagonal(d);
    double value = 0;
    for (i64 j = 0; j < d; ++j) {
      const double away = 1 - product.diagonal(0, j) / n;
      value += away * away;
      diagonal[j] = static_cast<T>(-2 * away / n);
    }
    const Slopes<T> slopes{static_cast<T>(2 * lambda / (n * n)), {diagonal, diagonal}, T(0)};
    return results(value + lambda * product.norm(slopes) / (n * n), gradients);
  });
}

std::tuple<Tensor, Tensor, Tensor> two_view_covariance(const Tensor& x, const Tensor& y, std::vector<double> weights,
                                                       double gamma, double eps, std::vector<bool> wanted) {
  return with_type(x, y, [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> gradients(x, y, wanted);
    const i64 d = x.size(1);
    const double n = static_cast<double>(x.size(0)), degrees = n - 1, wide = static_cast<double>(d);
    const Product<T> product({Batch<T>(x, Columns::kCentered), Batch<T>(y, Columns::kCentered)}, false, false, true,
                             gradients.out);
    Slopes<T> slopes{
        static_cast<T>(4 * weights[2] / (wide * degrees * degrees)), {}, static_cast<T>(2 * weights[0] / (n * wide))};
    double value = weights[0] * product.distance() / (n * wide);
    for (i64 v = 0; v < 2; ++v) {
      std::vector<T> diagonal(d);
      for (i64 j = 0; j < d; ++j) {
        const double std = std::sqrt(product.diagonal(v, j) / degrees + eps), gap = gamma - std;
        value += weights[1] / wide * (gap < 0 ? 0 : gap);  // NaN passes
        diagonal[j] = static_cast<T>(-weights[1] / wide * (gap > 0) / (std * degrees));
      }
      slopes.diagonal.push_back(std::move(diagonal));
    }
    return results(value + weights[2] * product.norm(slopes) / (wide * degrees * degrees), gradients);
  });
}

// f(cols, view's columns standardised, scratch of their size) for strips of columns that threads own
template <typename T, typename F>
void over_strips(const Batch<T>& batch, bool measure, const F& f) {
  const i64 threads = useful_threads(kFlopsAnElement * batch.rows * batch.cols);
  run(threads, [&](i64 t) {
    const Range mine = part(0, batch.cols, t, threads);
    const i64 width = std::min(mine.size(), strip_cols<T>(batch.rows));
    Buffer<T> z(batch.rows * width), scratch(measure ? 0 : batch.rows * width);
    for (i64 j = mine.begin; j < mine.end; j += width) {
      const Range cols{j, std::min(mine.end, j + width)};
      f(cols, batch.columns(cols, z, cols.size(), measure), scratch);
    }
  });
}

template <typename T>
void store(const View<T>& z, const Tensor& out, Range cols) {
  const i64 row = out.size(1);
  tiles<T>().store(z.data, data<char>(out) + cols.begin * static_cast<i64>(out.element_size()), kind(out), row, z.rows,
                   z.cols);
}

std::tuple<Tensor, Tensor> standardize(const Tensor& x, double eps, bool unbiased) {
  return with_type(x, x, [&](auto zero) {
    using T = decltype(zero);
    const Batch<T> batch(x, Columns::kStandardized, eps, unbiased);
    Tensor out = empty({batch.rows, batch.cols}, x.scalar_type());
    over_strips(batch, true, [&](Range cols, const View<T>& z, T*) { store(z, out, cols); });
    return std::make_tuple(out, batch.moments());
  });
}

Tensor standardize_backward(const Tensor& grad, const Tensor& x, const Tensor& moments, bool unbiased) {
  return with_type(x, x, [&](auto zero) {
    using T = decltype(zero);
    const Batch<T> batch(x, moments, unbiased), slope(grad);
    Tensor out = empty({batch.rows, batch.cols}, x.scalar_type());
    over_strips(batch, false, [&](Range cols, const View<T>& z, T* scratch) {
      slope.load(cols, scratch);
      const View<T> g{scratch, batch.rows, cols.size(), cols.size(), 1};
      batch.backward(cols, g, T(1), z, nullptr, nullptr, z, scratch, cols.size());
      store(g, out, cols);
    });
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("standardize", TORCH_BOX(&standardize));
  library.impl("standardize_backward", TORCH_BOX(&standardize_backward));
  library.impl("product_frobenius", TORCH_BOX(&product_frobenius));
  library.impl("two_view_correlation", TORCH_BOX(&two_view_correlation));
  library.impl("two_view_covariance", TORCH_BOX(&two_view_covariance));
}

}  // namespace sslkernels
