// SPDX-License-Identifier: Apache-2.0
// Soft cross-entropy of the logits of a prototype layer: what its two forms share.
#pragma once

#include "cpu/distillation.h"
#include "cpu/linear_panel.h"

namespace sslkernels {

// Hidden rows (views, samples, D) and the layers above them. Samples of weight zero, and a student view that no teacher
// is compared with, are left out: `active` and `first_view` say what remains.
template <typename T>
struct Prototypes {
  Prototypes(const Tensor& student, const Tensor& weight, const Tensor& teacher, const Tensor& teacher_weight,
             const Optional& center, const Optional& row_weight, double student_temp, double teacher_temp, bool exclude,
             bool mean);

  i64 samples() const { return static_cast<i64>(active.size()); }
  // Rows of the active samples `some`, view after view, times factor: (views * samples, D) and (teachers * samples, D).
  void load_students(Range some, T factor, T* out) const;
  void load_teachers(Range some, T factor, T* out) const;
  // null, or the centre of a teacher view
  const T* center(i64 view) const;
  // the row of (all views, all samples, D) that belongs to a student row
  i64 row(i64 view, i64 sample) const { return (first_view + view) * batch + active[sample]; }

  const Tensor student, teacher;
  const Operand<T> weight, teacher_weight;
  const double student_temp, teacher_temp;
  const bool exclude;
  const i64 teachers, batch, width, depth, first_view, views;
  Optional centers;
  std::vector<i64> active;
  std::vector<double> weights, shares;  // of the active samples: in the sum of the losses, in the result
  double norm = 1;
};

// Where gradients go, null where nobody wants one: dense rows, those of samples and views left out are not written.
template <typename T>
struct PrototypeGradients {
  T *student, *weight;
};

// The sum of weights times losses, by panels of the logits of a few samples, which are whole rows.
template <typename T>
double by_panels(const Prototypes<T>& p, i64 samples_a_panel, const PrototypeGradients<T>& out);

// The same by tiles of a few prototypes for all rows of many samples, whose logits are computed again where they are
// needed again.
template <typename T>
double by_tiles(const Prototypes<T>& p, i64 samples_a_sweep, const PrototypeGradients<T>& out);

}  // namespace sslkernels
