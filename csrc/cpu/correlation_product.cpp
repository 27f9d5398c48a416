// SPDX-License-Identifier: Apache-2.0
// The norm of C = a^T b and its gradients, in the space of the rows or in that of the features.
#include "cpu/correlation.h"

namespace sslkernels {

namespace {

constexpr i64 kPanelBytes = i64(8) << 20;                  // columns of a view, multiplied at once in Gram space
constexpr i64 kCBytes = i64(4) << 20;                      // rows of C, computed at once in feature space
constexpr i64 kGemmCols = 512, kGemmBytes = i64(3) << 20;  // columns that a thread multiplies at once

// ||a^T b||^2 = <a a^T, b b^T>. With symmetric halves that is N^2 (D + E) multiplications where C takes N D E, and the
// gradients' products scale alike. Here N <= D / 2 for D = E, so that at most half of the norm of uncorrelated columns
// is their diagonal, which is subtracted.
bool gram_space(i64 n, i64 d, i64 e) { return static_cast<double>(n) * (d + e) <= static_cast<double>(d) * e; }

double flops(i64 n, i64 d, i64 e) { return gram_space(n, d, e) ? 3.0 * n * n * (d + e) : 6.0 * n * d * e; }

template <typename T>
i64 gemm_cols(i64 rows) {
  return std::clamp<i64>(kGemmBytes / std::max<i64>(1, rows * i64(sizeof(T))) / 16 * 16, 128, kGemmCols);
}

// f(cols) for the range in pieces of `step`
template <typename F>
void in_strips(Range range, i64 step, const F& f) {
  for (i64 j = range.begin; j < range.end; j += step) f(Range{j, std::min(range.end, j + step)});
}

template <typename T>
View<T> columns_of(const View<T>& z, Range cols) {
  return {z.data + cols.begin, z.rows, cols.size(), z.row_stride, 1};
}

}  // namespace

template <typename T>
Product<T>::Product(std::vector<Batch<T>> sides, bool cross, bool whole, bool distance, std::vector<T*> out)
    : sides_(std::move(sides)),
      cross_(cross),
      whole_(whole),
      with_distance_(distance),
      out_(std::move(out)),
      rows_(sides_[0].rows) {
  const i64 d = sides_.front().cols, e = sides_.back().cols;
  wide_ = std::max(d, e);
  threads_ = useful_threads(flops(rows_, d, e));
  distances_.resize(threads_);
  if (!whole)
    diagonal_.assign(cross ? 1 : views(), std::vector<double>(wide_));
  if (!gram_space(rows_, d, e)) {
    treat_features(true);
    return;
  }
  measure_grams();
  double squares = 0;
  for (const auto& diagonal : diagonal_) {
    for (double x : diagonal) squares += x * x;
  }
  // Columns of very different length, or many that are zero: little but rounding would be left of the difference.
  const double total = norm_;
  norm_ -= squares;
  if (norm_ < total / 8)
    treat_features(false);
}

template <typename T>
double Product<T>::distance() const {
  double total = 0;
  for (double x : distances_) total += x;
  return total;
}

// Those of the columns that side v has: one side may be narrower than the other.
template <typename T>
Range Product<T>::clip(i64 v, Range cols) const {
  return {std::min(cols.begin, sides_[v].cols), std::min(cols.end, sides_[v].cols)};
}

template <typename T>
View<T> Product<T>::columns(i64 v, Range cols, T* room, i64 ld, bool measure) const {
  return sides_[v].columns(clip(v, cols), room, ld, measure);
}

// What is to be found in columns z but their products: C's diagonal and the distance of the views.
template <typename T>
void Product<T>::examine(Range cols, const std::vector<View<T>>& z, double* distance) {
  for (size_t v = 0; v < diagonal_.size(); ++v) {
    Strips<T>::column_dots(z[v], z[partner(v)], nullptr, &diagonal_[v][cols.begin]);
  }
  if (with_distance_)
    in_pairs(cols, [&](Range, const View<T>& x, const View<T>& y) { *distance += Strips<T>::squared_distance(x, y); });
}

// f(rows, x, y) with the two views as they are, a few rows at a time
template <typename T>
template <typename F>
void Product<T>::in_pairs(Range cols, const F& f) const {
  constexpr i64 kRows = 16;
  const i64 n = cols.size();
  std::vector<T> room(2 * kRows * n);
  in_strips({0, rows_}, kRows, [&](Range rows) {
    f(rows, sides_[0].raw(rows, cols, room.data(), n), sides_[1].raw(rows, cols, &room[kRows * n], n));
  });
}

// The gradient of the view's columns from g, that of its columns z by the products: `complete`, or without its factor
// and without what comes through C's diagonal.
template <typename T>
void Product<T>::finish(i64 v, Range cols, const View<T>& g, bool complete, const View<T>& z, const View<T>& other,
                        const Slopes<T>& slopes) const {
  const i64 n = cols.size(), d = sides_[v].cols;
  T* out = out_[v];
  const T factor = complete ? T(1) : slopes.product;
  const bool add = !complete && !whole_;
  const double* dots = add ? &diagonal_[cross_ ? 0 : v][cols.begin] : nullptr;
  std::vector<T> by_column(add ? n : 0);
  for (size_t j = 0; j < by_column.size(); ++j) {
    by_column[j] = static_cast<T>(slopes.diagonal[v][cols.begin + j] - slopes.product * dots[j]);
  }
  const T* own = add ? by_column.data() : nullptr;
  if (!with_distance_)
    return sides_[v].backward(cols, g, factor, other, own, dots, z, out + cols.begin, d);
  const auto rows_of = [](const View<T>& x, Range rows) {
    return View<T>{x.data + rows.begin * x.row_stride, rows.size(), x.cols, x.row_stride, 1};
  };
  in_pairs(cols, [&](Range rows, const View<T>& x, const View<T>& y) {
    Strips<T>::blend_difference(rows_of(g, rows), factor, rows_of(other, rows), own, x, y,
                                v == 0 ? slopes.difference : -slopes.difference, out + rows.begin * d + cols.begin, d);
  });
}

template <typename T>
void Product<T>::measure_grams() {
  const i64 fitting = kPanelBytes / std::max<i64>(1, rows_ * i64(sizeof(T))) / 16 * 16;
  const i64 width = std::min(wide_, std::max<i64>(fitting, 256)), ld = width + 16, strip = strip_cols<T>(rows_);
  std::vector<Buffer<T>> panels;
  bool nothing_to_do = whole_ && !with_distance_;
  for (const Batch<T>& side : sides_) {
    panels.emplace_back(side.in_place() ? 0 : rows_ * ld);
    nothing_to_do &= side.in_place();
  }
  grams_.emplace(views(), rows_, threads_);
  in_strips({0, wide_}, width, [&](Range panel) {
    if (!nothing_to_do) {
      run(threads_, [&](i64 t) {
        in_strips(part(panel.begin, panel.end, t, threads_), strip, [&](Range cols) {
          std::vector<View<T>> z;
          for (i64 v = 0; v < views(); ++v)
            z.push_back(columns(v, cols, panels[v] + (cols.begin - panel.begin), ld, true));
          examine(cols, z, &distances_[t]);
        });
      });
    }
    std::vector<View<T>> z;
    for (i64 v = 0; v < views(); ++v) {
      z.push_back(sides_[v].in_place() ? columns(v, panel, nullptr, 0, false)
                                       : View<T>{panels[v], rows_, clip(v, panel).size(), ld, 1});
    }
    grams_->add(z);
  });
  grams_->close();
  for (i64 v = 0; v < (cross_ ? 1 : views()); ++v) norm_ += grams_->inner(v, partner(v));
}

template <typename T>
void Product<T>::gram_gradients(const Slopes<T>& slopes) const {
  run(threads_, [&](i64 t) {
    const Range mine = part(0, wide_, t, threads_);
    const i64 width = std::min(mine.size(), gemm_cols<T>(rows_)), ld = width + 16;
    std::vector<Buffer<T>> rooms;
    for (const Batch<T>& side : sides_) rooms.emplace_back(side.in_place() ? 0 : rows_ * ld);
    Buffer<T> product(rows_ * ld);
    in_strips(mine, width, [&](Range panel) {
      std::vector<View<T>> z;
      for (i64 v = 0; v < views(); ++v) z.push_back(columns(v, panel, rooms[v], ld, false));
      for (i64 v = 0; v < views(); ++v) {
        if (!out_[v] || !z[v].cols)
          continue;
        const View<T> g{product, rows_, z[v].cols, ld, 1};
        multiply<T>(g, (*grams_)[partner(v)], z[v]);
        finish(v, clip(v, panel), g, false, z[v], z[partner(v)], slopes);
      }
    });
  });
}

template <typename T>
void Product<T>::treat_features(bool measure) {
  grams_.reset();
  std::vector<T*> rooms;
  for (i64 v = 0; v < views(); ++v) {
    const Batch<T>& side = sides_[v];
    // the gradient of the first of two sides is made column by column, and takes the place of these
    const bool lent = cross_ && v == 0 && out_[v] && !side.in_place();
    copies_.emplace_back(lent || side.in_place() ? 0 : rows_ * side.cols);
    rooms.push_back(lent ? out_[v] : copies_.back());
    treated_.push_back(side.in_place() ? side.columns({0, side.cols}, nullptr, 0, false)
                                       : View<T>{rooms[v], rows_, side.cols, side.cols, 1});
  }
  run(threads_, [&](i64 t) {
    in_strips(part(0, wide_, t, threads_), strip_cols<T>(rows_), [&](Range cols) {
      std::vector<View<T>> z;
      for (i64 v = 0; v < views(); ++v) z.push_back(columns(v, cols, rooms[v] + cols.begin, sides_[v].cols, measure));
      if (measure)
        examine(cols, z, &distances_[t]);
    });
  });
}

// A panel of rows of C becomes, in place, what its products with the columns are the gradients of. A symmetric C is one
// side's: what lies right of a panel's square on the diagonal counts twice.
template <typename T>
double Product<T>::feature_product(i64 left, i64 right, const Slopes<T>& slopes) const {
  const bool symmetric = left == right, lent = treated_[left].data == out_[left];
  const View<T>&a = treated_[left], &b = treated_[right];
  T *da = out_[left], *db = out_[right];
  const i64 rows_fitting = std::max<i64>(kCBytes, rows_ * b.cols * i64(sizeof(T)) / 8) / (b.cols * i64(sizeof(T)));
  const i64 wanted = symmetric ? std::min(rows_fitting, a.cols / 8) : rows_fitting;
  const i64 height = std::min(a.cols, std::max<i64>(wanted / 16 * 16, 128));
  Buffer<T> c(height * b.cols), products(lent || height < a.cols ? threads_ * rows_ * kGemmCols : 0);
  std::vector<double> sums(threads_);
  // columns `to` of an (N, D) gradient gain x w
  const auto gain = [&](i64 t, T* gradient, i64 d, Range to, const View<T>& x, const View<T>& w, bool first) {
    if (first)
      return multiply<T>({gradient + to.begin, rows_, to.size(), d, 1}, x, w);
    T* product = products + t * rows_ * kGemmCols;
    multiply<T>({product, rows_, to.size(), to.size(), 1}, x, w);
    tiles<T>().add(gradient + to.begin, d, product, to.size(), rows_, to.size());
  };
  in_strips({0, a.cols}, height, [&](Range rows) {
    const View<T> panel = columns_of(a, rows);
    const Range all{symmetric ? rows.begin : 0, b.cols};
    const auto entries = [&](Range of, Range cols) {
      T* first = c + (of.begin - rows.begin) * all.size() + (cols.begin - all.begin);
      return View<T>{first, of.size(), cols.size(), all.size(), 1};
    };
    run(threads_, [&](i64 t) {
      in_strips(part(all.begin, all.end, t, threads_), kGemmCols, [&](Range cols) {
        multiply<T>(entries(rows, cols), panel.transposed(), columns_of(b, cols));
        const i64 once = symmetric ? std::clamp(rows.end, cols.begin, cols.end) : cols.end;
        for (const Range some : {Range{cols.begin, once}, Range{once, cols.end}}) {
          if (!some.size())
            continue;
          const T* diagonal = whole_ ? nullptr : slopes.diagonal[left].data() + some.begin;
          const double sum = Strips<T>::weigh(c + (some.begin - all.begin), all.size(), rows.size(), some.size(),
                                              rows.begin - some.begin, diagonal, slopes.product);
          sums[t] += some.begin < once ? sum : 2 * sum;
        }
        if (db)
          gain(t, db, b.cols, cols, panel, entries(rows, cols), rows.begin == 0);
      });
    });
    const Range others{symmetric ? rows.end : 0, b.cols};
    if (!da || !others.size())
      return;
    run(threads_, [&](i64 t) {
      in_strips(part(rows.begin, rows.end, t, threads_), kGemmCols, [&](Range mine) {
        const View<T> w = entries(mine, others).transposed(), z = columns_of(a, mine);
        if (!lent)
          return gain(t, da, a.cols, mine, columns_of(b, others), w, !symmetric);
        const View<T> g{products + t * rows_ * kGemmCols, rows_, mine.size(), mine.size(), 1};
        multiply<T>(g, columns_of(b, others), w);
        finish(left, mine, g, true, z, z, slopes);
      });
    });
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

template <typename T>
double Product<T>::norm(const Slopes<T>& slopes) const {
  const bool any = std::any_of(out_.begin(), out_.end(), [](T* x) { return x != nullptr; });
  if (grams_) {
    if (any)
      gram_gradients(slopes);
    return norm_;
  }
  double total = 0;
  for (i64 v = 0; v < (cross_ ? 1 : views()); ++v) total += feature_product(v, partner(v), slopes);
  if (any) {
    run(threads_, [&](i64 t) {
      in_strips(part(0, wide_, t, threads_), strip_cols<T>(rows_), [&](Range cols) {
        for (i64 v = 0; v < views(); ++v) {
          const Range within = clip(v, cols);
          if (!out_[v] || treated_[v].data == out_[v] || !within.size() ||
              !(with_distance_ || sides_[v].treatment == Columns::kStandardized))
            continue;
          const View<T> z = columns_of(treated_[v], within),
                        g{out_[v] + within.begin, rows_, within.size(), sides_[v].cols, 1};
          finish(v, within, g, true, z, z, slopes);
        }
      });
    });
  }
  return total;
}

template class Product<float>;
template class Product<double>;

}  // namespace sslkernels
