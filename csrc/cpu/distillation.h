// SPDX-License-Identifier: Apache-2.0
// The rows of one sample: teachers become probabilities once, then each student row meets their sum in one visit.
#pragma once

#include "cpu/denormals.h"
#include "cpu/operand.h"

namespace sslkernels {

constexpr i64 kChunk = 2048;  // elements of a row that stay in the first-level cache, and are summed in T

// One row of logits, `stride` elements apart.
struct Row {
  char* data;
  Dtype dtype;
  i64 stride;
};

// Rows of logits by view and sample, of tensors (B, V) and (S_i, B, V) whose views count in order.
class Views {
 public:
  explicit Views(const std::vector<Tensor>& xs);
  Row row(i64 view, i64 b) const {
    const View& v = views_[view];
    return {v.data + b * v.row_bytes, v.dtype, v.stride};
  }
  i64 count() const { return static_cast<i64>(views_.size()); }

 private:
  struct View {
    char* data;
    i64 row_bytes, stride;
    Dtype dtype;
  };
  std::vector<View> views_;

 public:
  i64 batch, width;
};

// A softmax over one row in chunks of kChunk: exponentials are taken against the largest element so far, and what was
// taken against another is put right by share().
class Online {
 public:
  Online(i64 width, double temperature);
  void start();
  // Chunk c, with the largest element `top`, comes: the reference of its exponentials.
  double reference(i64 c, double top);
  // It has this sum of the exponentials of all elements but those equal to the reference, of which there are `ties`.
  void add(double sum, i64 ties) {
    rest_ += sum;
    ties_ += ties;
  }
  double largest() const { return max_; }
  double inverse() const { return inverse_; }
  // the factor that carries the exponentials of chunk c over to the largest element of all
  double share(i64 c) const;
  // largest element of all minus the reference of chunk c
  double lag(i64 c) const { return std::isfinite(refs_[c]) ? max_ - refs_[c] : 0.0; }
  // the sum of all exponentials less 1, which is exp(0): small where one element has most of the mass
  double excess() const { return std::isfinite(max_) ? rest_ + (ties_ - 1) : std::nan(""); }
  // the chunk of the largest element
  i64 peak() const { return peak_; }

 private:
  double inverse_, max_ = 0, rest_ = 0, ties_ = 0;
  i64 peak_ = 0;
  std::vector<double> refs_;
};

// out = softmax((row - center) / temperature), dense, where `online` has the temperature and `center` may be null; the
// row is added to `sum`, and the sum of each chunk of the result stored in `sums`, unless they are null. `scratch` has
// kChunk elements.
template <typename T>
void soften(const Row& row, i64 width, const T* center, Online& online, T* sum, T* out, double* sums, T* scratch);

// The teachers' probabilities of one sample, their sums, and what its students make of them. One a thread; memory for
// (teachers + 2) rows.
//
// A student that agrees with a sure teacher keeps its digits: the loss is a sum of terms p_v (lse - x_v) >= 0 in which
// lse - max x is the log1p of what the other exponentials sum to, and the gradient at the maximum is minus the sum of
// the others.
template <typename T>
class Sample {
 public:
  Sample(i64 width, i64 teachers, double student_temp, double teacher_temp, bool exclude);

  // Teacher view t of the next sample; all views must come before the first student. `center` and `sum` as in soften.
  void teach(i64 t, const Row& row, const T* center, T* sum);

  // Student view s: the sum over teachers t != s (or all) of the cross-entropy of p_t and softmax(row / temperature).
  // `gradient`, unless null, is weight times the derivative; it may be the row itself. `past_caches`: it will not be
  // read soon; wants finish_streams().
  double learn(i64 s, const Row& row, double weight, const Row* gradient, bool past_caches);

 private:
  // What a student meets: a sum of teachers' probabilities, and that over each chunk.
  struct Target {
    const T* p;
    const double* sums;
    double number;
  };
  Target target(i64 s);
  Target add_up(i64 skip, T* out, std::vector<double>& sums) const;
  double own_slope(const Target& target, i64 at) const;

  i64 width_, chunks_, teachers_;
  bool exclude_, added_ = false;
  Online teacher_, student_;
  Buffer<T> p_, all_, others_, e_, scratch_;
  std::vector<double> p_sums_, all_sums_, other_sums_, dots_;
};

// Sums over rows, blocks of rows in T joined in double: the share of one thread.
template <typename T>
class ColumnSums {
 public:
  ColumnSums(i64 width, double* total);  // clears total
  // what the next row is to be added to
  T* next();
  void flush();

 private:
  i64 width_, rows_ = 0;
  double* total_;
  Buffer<T> block_;
};

// zeros in place of a gradient
void clear(const Row& row, i64 width);

}  // namespace sslkernels
