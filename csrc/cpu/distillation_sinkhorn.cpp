// SPDX-License-Identifier: Apache-2.0
// Sinkhorn-Knopp: one sweep over the scores for each iteration, which keeps a number a prototype, and one for the
// codes.
//
// With e_bk = exp((x_bk - c_k) / eps) and Z_b = sum_k e_bk, an iteration is c_k += eps log(K / B sum_b e_bk / Z_b). By
// the factor K / B the Z_b of usual samples stay near one, so that a row needs no maximum first; a row whose Z_b leaves
// the range where its terms are exact is done again relative to its own maximum. The sum over b is at least 1 / K
// relative to its largest term, as each column of e starts with the sum B / K, and cannot vanish.
#include "cpu/operand.h"

namespace sslkernels {
// Rows that are visited side by side: memory delivers several of them sooner than one. The first sweep keeps nothing of
// a row, the others its weights, which must stay in the cache.
constexpr i64 kRowsAtOnce = 8, kRowsShared = 4;

// What a difference of scores is multiplied by, and where its exponential stops.
template <typename T>
struct Rate;

template <>
struct Rate<float> {
  explicit Rate(double epsilon)
      : high(static_cast<float>(kLog2E / epsilon)),
        low(static_cast<float>(kLog2E / epsilon - high)),
        least(static_cast<float>(-100 * epsilon / kLog2E)),
        most(static_cast<float>(120 * epsilon / kLog2E)) {}
  static constexpr double kLog2E = 1.4426950408889634;
  float high, low, least, most;
};

template <>
struct Rate<double> {
  explicit Rate(double epsilon) : high(1 / epsilon), most(80 * epsilon) {}
  double high, most;
};
}  // namespace sslkernels

#define SSLKERNELS_LEAVES "cpu/distillation_sinkhorn.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

constexpr i64 kPiece = 1024;       // columns that are summed in T before they join a sum in double
constexpr i64 kRowsTogether = 64;  // rows that are summed before their sum joins that of the others
constexpr double kFlopsAnExp = 64;

// The scores (B, K) of one view, of any dtype and strides.
template <typename T>
class Scores {
 public:
  Scores(const Tensor& x, i64 view)
      : rows(x.size(x.dim() - 2)),
        cols(x.size(x.dim() - 1)),
        row_stride_(x.stride(x.dim() - 2)),
        col_stride_(x.stride(x.dim() - 1)),
        bytes_(static_cast<i64>(x.element_size())),
        data_(static_cast<const char*>(x.const_data_ptr()) + (x.dim() == 3 ? view * x.stride(0) * bytes_ : 0)),
        dtype_(kind(x)),
        direct_(x.scalar_type() == kScalar<T> && (col_stride_ == 1 || cols == 1)) {}

  // `count` rows of `width` columns from (row, col) on: where they lie, else converted into `scratch`
  const T* fetch(i64 row, i64 count, i64 col, i64 width, T* scratch, i64* ld) const {
    const char* at = data_ + (row * row_stride_ + col * col_stride_) * bytes_;
    *ld = direct_ ? row_stride_ : width;
    if (direct_)
      return reinterpret_cast<const T*>(at);
    tiles<T>().load(at, dtype_, row_stride_, col_stride_, scratch, count, width, T(1));
    return scratch;
  }

  const i64 rows, cols;

 private:
  i64 row_stride_, col_stride_, bytes_;
  const char* data_;
  Dtype dtype_;
  bool direct_;
};

template <typename T>
class Sinkhorn {
 public:
  Sinkhorn(const Tensor& x, i64 view, double epsilon)
      : x_(x, view),
        rate_(epsilon),
        epsilon_(static_cast<T>(epsilon)),
        threads_(useful_threads(kFlopsAnExp * x_.rows * x_.cols)) {}

  void center(i64 iterations, T* c) const {
    const T ratio = static_cast<T>(static_cast<double>(x_.cols) / x_.rows);
    sweep_scores(ratio, c);
    for (i64 i = 1; i < iterations; ++i) sweep_shares(c, ratio, c);
  }

  // without a centre the first sweep, with one those after it
  void sweep(const T* c, T* out) const {
    if (x_.rows == 0) {
      std::fill_n(out, x_.cols, kNone<T>);
    } else if (c == nullptr) {
      sweep_scores(T(1), out);
    } else {
      std::fill_n(out, x_.cols, T(0));
      sweep_shares(c, T(1), out);
    }
  }

  void codes(const T* c, T* out) const {
    const i64 k = x_.cols;
    run(threads_, [&](i64 t) {
      const Range mine = rows_of(t, threads_);
      visit(
          mine, c,
          [&](i64 row, const T* weights, T inverse) {
            tiles<T>().scale_rows(out + row * k, 0, weights, 0, &inverse, 1, k);
          },
          [&](const T* x, i64 ld, i64 row, i64 count, i64 at, i64 n, T* weights, const T* inverse, T* sums) {
            // there is nothing before the first rows: what is written then is written over
            T* before = out + std::max(row - kRowsShared, mine.begin) * k + at;
            SSLKERNELS_AT_LEVEL(write_and_weigh<T>(x, ld, count, c + at, n, rate_, weights, k, inverse, before, sums));
          });
    });
  }

 private:
  Range rows_of(i64 t, i64 threads) const { return {x_.rows * t / threads, x_.rows * (t + 1) / threads}; }

  // c_k = epsilon log(ratio sum_b exp(x_bk / epsilon))
  void sweep_scores(T ratio, T* c) const {
    run(threads_, [&](i64 t) {
      const Range mine = part(0, x_.cols, t, threads_);
      Buffer<T> sums(mine.size()), scratch(kRowsAtOnce * kPiece);
      std::fill(c + mine.begin, c + mine.end, kNone<T>);
      std::fill_n(static_cast<T*>(sums), mine.size(), T(0));
      for (i64 b = 0; b < x_.rows; b += kRowsAtOnce) {
        const i64 count = std::min(kRowsAtOnce, x_.rows - b);
        for (i64 k = mine.begin; k < mine.end; k += kPiece) {
          const i64 n = std::min(kPiece, mine.end - k);
          i64 ld;
          const T* x = x_.fetch(b, count, k, n, scratch, &ld);
          SSLKERNELS_AT_LEVEL(column_sums<T>(x, ld, count, n, rate_, c + k, sums + (k - mine.begin)));
        }
      }
      SSLKERNELS_AT_LEVEL(recenter<T>(mine.size(), sums, ratio, epsilon_, c + mine.begin));
    });
  }

  // out_k += epsilon log(ratio sum_b e_bk / Z_b); out may be c
  void sweep_shares(const T* c, T ratio, T* out) const {
    const i64 k = x_.cols, threads = std::min(threads_, x_.rows);
    Buffer<T> shares(threads * k);
    run(threads, [&](i64 t) { share(rows_of(t, threads), c, shares + t * k); });
    run(threads_, [&](i64 t) {
      const Range mine = part(0, k, t, threads_);
      for (i64 other = 1; other < threads; ++other)
        tiles<T>().axpy(shares + mine.begin, T(1), shares + other * k + mine.begin, mine.size());
      SSLKERNELS_AT_LEVEL(recenter<T>(mine.size(), shares + mine.begin, ratio, epsilon_, out + mine.begin));
    });
  }

  // total_k = sum over `rows` of e_bk / Z_b
  void share(Range rows, const T* c, T* total) const {
    const i64 k = x_.cols;
    Buffer<T> recent(k);
    std::fill_n(static_cast<T*>(recent), k, T(0));
    std::fill_n(total, k, T(0));
    visit(
        rows, c, [&](i64, const T* weights, T inverse) { tiles<T>().axpy(recent, inverse, weights, k); },
        [&](const T* x, i64 ld, i64 row, i64 count, i64 at, i64 n, T* weights, const T* inverse, T* sums) {
          if ((row - rows.begin) % kRowsTogether == 0)
            SSLKERNELS_AT_LEVEL(move_sums<T>(n, recent + at, total + at));
          SSLKERNELS_AT_LEVEL(
              share_and_weigh<T>(x, ld, count, c + at, n, rate_, weights, k, inverse, recent + at, sums));
        });
    SSLKERNELS_AT_LEVEL(move_sums<T>(k, recent, total));
  }

  // Visits rows side by side, a piece of columns at a time: step(x, ld, first row, count, first column, columns,
  // weights, inverse, sums) makes the weights e_bk of this piece, and their sums. Z_b is known at the end of a row, so
  // the step also does with the weights that it overwrites, and `inverse` = 1 / Z_b of those rows, what is to be done;
  // for the last rows leave(row, weights, 1 / Z_b) does.
  template <typename Leave, typename Step>
  void visit(Range rows, const T* c, const Leave& leave, const Step& step) const {
    const i64 k = x_.cols;
    Buffer<T> weights(kRowsShared * k), scratch(kRowsShared * kPiece);
    std::fill_n(static_cast<T*>(weights), kRowsShared * k, T(0));
    T inverse[kRowsShared] = {};
    i64 before = 0;  // rows whose weights wait
    for (i64 b = rows.begin; b < rows.end; b += kRowsShared) {
      const i64 count = std::min(kRowsShared, rows.end - b);
      for (i64 i = count; i < before; ++i) leave(b - before + i, weights + i * k, inverse[i]);
      double sum[kRowsShared] = {};
      for (i64 at = 0; at < k; at += kPiece) {
        const i64 n = std::min(kPiece, k - at);
        i64 ld;
        T sums[kRowsShared];
        const T* x = x_.fetch(b, count, at, n, scratch, &ld);
        step(x, ld, b, count, at, n, weights + at, inverse, sums);
        for (i64 i = 0; i < count; ++i) sum[i] += sums[i];
      }
      for (i64 i = 0; i < count; ++i) inverse[i] = inverse_of(sum[i], b + i, c, scratch, weights + i * k);
      before = count;
    }
    for (i64 i = 0; i < before; ++i) leave(rows.end - before + i, weights + i * k, inverse[i]);
  }

  // 1 / sum of the weights of row b, made again relative to the largest of them where exp has left its range
  T inverse_of(double sum, i64 b, const T* c, T* scratch, T* weights) const {
    if (sum > 1e-12 && sum < 1e7)
      return static_cast<T>(1 / sum);
    T highest = kNone<T>;
    pieces(b, scratch, [&](const T* x, i64 k, i64 n) {
      highest = std::max(highest, SSLKERNELS_AT_LEVEL(largest<T>(x, c + k, n)));
      return T(0);
    });
    return static_cast<T>(1 / pieces(b, scratch, [&](const T* x, i64 k, i64 n) {
                            return SSLKERNELS_AT_LEVEL(weigh<T>(x, c + k, n, rate_, highest, weights + k));
                          }));
  }

  // sum of f(piece of row b, its first column, its length)
  template <typename F>
  double pieces(i64 b, T* scratch, const F& f) const {
    double sum = 0;
    for (i64 k = 0; k < x_.cols; k += kPiece) {
      const i64 n = std::min(kPiece, x_.cols - k);
      i64 ld;
      sum += f(x_.fetch(b, 1, k, n, scratch, &ld), k, n);
    }
    return sum;
  }

  const Scores<T> x_;
  const Rate<T> rate_;
  T epsilon_;
  i64 threads_;
};

std::vector<i64> sizes(const Tensor& x, bool of_center) {
  std::vector<i64> out;
  for (i64 d = 0; d < x.dim(); ++d) {
    if (!of_center || d != x.dim() - 2)
      out.push_back(x.size(d));
  }
  return out;
}

Tensor sinkhorn_center(const Tensor& scores, i64 iterations, double epsilon) {
  return with_type(is_double(scores), [&](auto zero) {
    using T = decltype(zero);
    Tensor result = empty(sizes(scores, true), kScalar<T>);
    const i64 views = scores.dim() == 3 ? scores.size(0) : 1, cols = scores.size(scores.dim() - 1);
    for (i64 v = 0; v < views; ++v) Sinkhorn<T>(scores, v, epsilon).center(iterations, data<T>(result) + v * cols);
    return result;
  });
}

Tensor sinkhorn_sweep(const Tensor& scores, const std::optional<Tensor>& center, double epsilon) {
  return with_type(is_double(scores), [&](auto zero) {
    using T = decltype(zero);
    Tensor result = empty(sizes(scores, true), kScalar<T>);
    const i64 views = scores.dim() == 3 ? scores.size(0) : 1, cols = scores.size(scores.dim() - 1);
    for (i64 v = 0; v < views; ++v) {
      const T* c = center ? static_cast<const T*>(center->const_data_ptr()) + v * cols : nullptr;
      Sinkhorn<T>(scores, v, epsilon).sweep(c, data<T>(result) + v * cols);
    }
    return result;
  });
}

Tensor sinkhorn_knopp(const Tensor& scores, i64 iterations, double epsilon) {
  return with_type(is_double(scores), [&](auto zero) {
    using T = decltype(zero);
    Tensor result = empty(sizes(scores, false), kScalar<T>);
    const i64 views = scores.dim() == 3 ? scores.size(0) : 1, cols = scores.size(scores.dim() - 1);
    Buffer<T> center(cols);
    for (i64 v = 0; v < views; ++v) {
      const Sinkhorn<T> view(scores, v, epsilon);
      view.center(iterations, center);
      view.codes(center, data<T>(result) + v * (scores.numel() / views));
    }
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("sinkhorn_center", TORCH_BOX(&sinkhorn_center));
  library.impl("sinkhorn_knopp", TORCH_BOX(&sinkhorn_knopp));
  library.impl("sinkhorn_sweep", TORCH_BOX(&sinkhorn_sweep));
}

}  // namespace sslkernels
