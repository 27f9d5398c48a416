// SPDX-License-Identifier: Apache-2.0
// Soft cross-entropy of logits that are there, and the softmax of a teacher.
#include "cpu/distillation.h"
#include "cpu/patches.h"

namespace sslkernels {

namespace {

Tensor dense(const Tensor& x, ScalarType dtype) { return torch::stable::contiguous(torch::stable::to(x, dtype)); }

std::vector<double> weights_of(const Optional& row_weight, i64 batch) {
  if (!row_weight)
    return std::vector<double>(batch, 1.0);
  const Tensor w = dense(*row_weight, ScalarType::Double);
  return std::vector<double>(data<double>(w), data<double>(w) + batch);
}

// The mean over `rows` rows of what the threads have summed.
template <typename T>
void mean_of(const double* totals, i64 parts, i64 width, i64 rows, T* out) {
  over_rows(width, kFlopsAnElement * width * parts, [&](Range mine) {
    for (i64 j = mine.begin; j < mine.end; ++j) {
      double sum = 0;
      for (i64 t = 0; t < parts; ++t) sum += totals[t * width + j];
      out[j] = static_cast<T>(sum / rows);
    }
  });
}

struct Problem {
  Problem(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, const Optional& center,
          double student_temp, double teacher_temp, bool exclude)
      : s(student), t(teacher), student_temp(student_temp), teacher_temp(teacher_temp), exclude(exclude) {
    wide = is_double(student[0]) || is_double(teacher[0]);
    pairs = s.count() * t.count() - (exclude ? std::min(s.count(), t.count()) : 0);
    if (center)
      centers = dense(*center, wide ? ScalarType::Double : ScalarType::Float);
  }
  template <typename T>
  const T* center(i64 view) const {
    if (!centers)
      return nullptr;
    return data<T>(*centers) + (centers->size(0) > 1 ? view * s.width : 0);
  }

  Views s, t;
  double student_temp, teacher_temp;
  bool exclude, wide;
  i64 pairs;
  Optional centers;
};

// The students' rows and where their gradients go.
struct Gradients {
  Gradients(const std::vector<Tensor>& student, const std::vector<bool>& wanted, bool in_place) {
    i64 all = 0;
    for (size_t i = 0; i < student.size(); ++i) {
      const Tensor& x = student[i];
      std::vector<i64> shape;
      for (i64 d = 0; wanted[i] && d < x.dim(); ++d) shape.push_back(x.size(d));
      tensors.push_back(in_place && wanted[i] ? x : empty(wanted[i] ? shape : std::vector<i64>{0}, x.scalar_type()));
      const i64 views = x.dim() == 3 ? x.size(0) : 1;
      needed.insert(needed.end(), views, wanted[i]);
      all += wanted[i] ? static_cast<i64>(x.numel() * x.element_size()) : 0;
      // the views of a gradient that nobody wants are those of its student, so that the others keep their numbers
      places.push_back(wanted[i] ? tensors.back() : x);
    }
    constexpr i64 kCached = i64(16) << 20;
    past_caches = !in_place && all > kCached;
    rows = std::make_unique<Views>(places);
  }
  bool any() const { return std::find(needed.begin(), needed.end(), true) != needed.end(); }

  std::vector<Tensor> tensors, places;
  std::vector<bool> needed;
  bool past_caches;
  std::unique_ptr<Views> rows;
};

// Every student row with its teachers, sample by sample. weight(s, b) is the row's share of the result, value(s, b, x)
// takes what it is worth. Threads share the rows of all samples; who begins in the middle of one softens its teachers
// again.
template <typename T, typename W, typename F>
void visit(const Problem& p, const W& weight, const Gradients* gradients, T* mean, const F& value) {
  const i64 views = p.s.count(), batch = p.s.batch, width = p.s.width, rows = views * batch;
  const double flops = kFlopsAnElement * width * batch * (views + p.t.count());
  const i64 threads = std::max<i64>(1, std::min(useful_threads(flops), rows));
  Buffer<double> totals(mean ? threads * width : 0);
  run(threads, [&](i64 thread) {
    Sample<T> sample(width, p.t.count(), p.student_temp, p.teacher_temp, p.exclude);
    std::optional<ColumnSums<T>> sums;
    if (mean)
      sums.emplace(width, totals + thread * width);
    const i64 end = rows * (thread + 1) / threads;
    for (i64 row = rows * thread / threads; row < end;) {
      const i64 b = row / views, first = row % views, last = std::min(views, first + end - row);
      bool counts = false;
      for (i64 s = first; s < last; ++s) counts |= weight(s, b) != 0;
      const bool sum = mean && first == 0;  // once a sample
      for (i64 t = 0; (counts || sum) && t < p.t.count(); ++t)
        sample.teach(t, p.t.row(t, b), p.center<T>(t), sum ? sums->next() : nullptr);
      for (i64 s = first; s < last; ++s) {
        const double w = weight(s, b);
        std::optional<Row> out;
        if (gradients && gradients->needed[s])
          out = gradients->rows->row(s, b);
        if (w != 0)
          value(s, b, sample.learn(s, p.s.row(s, b), w, out ? &*out : nullptr, gradients && gradients->past_caches));
        else if (out)
          clear(*out, width);
      }
      row += last - first;
    }
    if (mean)
      sums->flush();
    finish_streams();
  });
  if (mean)
    mean_of(totals, threads, width, batch * p.t.count(), mean);
}

// What the emitted gradient must be multiplied with: 1, but for float16 whatever fills its range best.
double emission_scale(const std::vector<double>& shares, const Problem& p, const Tensor& student) {
  double largest = 0;
  if (student.scalar_type() == ScalarType::Half) {
    for (const double w : shares) largest = std::max(largest, std::abs(w));
  }
  return largest > 0 ? largest * p.t.count() / p.student_temp / 32768 : 1.0;
}

std::vector<Tensor> forward_into(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                                 const Optional& center, const Optional& row_weight, double student_temp,
                                 double teacher_temp, bool exclude, bool mean, const std::vector<bool>& wanted,
                                 bool in_place) {
  const Problem p(student, teacher, center, student_temp, teacher_temp, exclude);
  const std::vector<double> weights = weights_of(row_weight, p.s.batch);
  double norm = 1;
  if (mean) {
    double sum = 0;
    for (const double w : weights) sum += w;
    norm = 1 / (p.pairs * sum);
  }
  std::vector<double> shares(weights);
  for (double& w : shares) w = w == 0 ? 0 : w * norm;
  const double scale = emission_scale(shares, p, student[0]);
  const Gradients gradients(student, wanted, in_place);
  return with_type(p.wide, [&](auto zero) {
    using T = decltype(zero);
    Tensor loss = empty({}, kScalar<T>), unit = empty({}, kScalar<T>);
    Tensor column_mean = empty({wanted.back() ? p.s.width : 0}, kScalar<T>);
    std::vector<double> values(p.s.count() * p.s.batch);
    visit<T>(
        p, [&](i64, i64 b) { return shares[b] / scale; }, gradients.any() ? &gradients : nullptr,
        wanted.back() ? data<T>(column_mean) : nullptr,
        [&](i64 s, i64 b, double value) { values[s * p.s.batch + b] = weights[b] * value; });
    double total = 0;
    for (const double v : values) total += v;
    *data<T>(loss) = static_cast<T>(total * norm);
    *data<T>(unit) = static_cast<T>(scale);
    std::vector<Tensor> out{loss, column_mean, unit};
    if (!in_place)
      out.insert(out.end(), gradients.tensors.begin(), gradients.tensors.end());
    return out;
  });
}

std::vector<Tensor> forward(std::vector<Tensor> student, std::vector<Tensor> teacher, const Optional& center,
                            const Optional& row_weight, double student_temp, double teacher_temp, bool exclude,
                            bool mean, std::vector<bool> wanted) {
  return forward_into(student, teacher, center, row_weight, student_temp, teacher_temp, exclude, mean, wanted, false);
}

std::tuple<Tensor, Tensor, Tensor> forward_in_place(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                    const Optional& center, const Optional& row_weight,
                                                    double student_temp, double teacher_temp, bool exclude, bool mean,
                                                    std::vector<bool> wanted) {
  const std::vector<Tensor> out =
      forward_into(student, teacher, center, row_weight, student_temp, teacher_temp, exclude, mean, wanted, true);
  return {out[0], out[1], out[2]};
}

std::vector<Tensor> rows_forward(std::vector<Tensor> student, std::vector<Tensor> teacher, const Optional& center,
                                 const Optional& row_weight, double student_temp, double teacher_temp, bool exclude,
                                 bool need_mean) {
  const Problem p(student, teacher, center, student_temp, teacher_temp, exclude);
  const std::vector<double> weights = weights_of(row_weight, p.s.batch);
  return with_type(p.wide, [&](auto zero) {
    using T = decltype(zero);
    Tensor rows = empty({p.s.count(), p.s.batch}, kScalar<T>);
    Tensor column_mean = empty({need_mean ? p.s.width : 0}, kScalar<T>);
    T* out = data<T>(rows);
    std::fill_n(out, rows.numel(), T(0));
    visit<T>(
        p, [&](i64, i64 b) { return weights[b]; }, nullptr, need_mean ? data<T>(column_mean) : nullptr,
        [&](i64 s, i64 b, double value) { out[s * p.s.batch + b] = static_cast<T>(weights[b] * value); });
    return std::vector<Tensor>{rows, column_mean};
  });
}

std::vector<Tensor> rows_backward(const Tensor& grad, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                  const Optional& center, const Optional& row_weight, double student_temp,
                                  double teacher_temp, bool exclude, std::vector<bool> wanted) {
  const Problem p(student, teacher, center, student_temp, teacher_temp, exclude);
  const std::vector<double> weights = weights_of(row_weight, p.s.batch);
  const Gradients gradients(student, wanted, false);
  const Tensor upstream = dense(grad, ScalarType::Double);
  const double* g = data<double>(upstream);
  with_type(p.wide, [&](auto zero) {
    using T = decltype(zero);
    visit<T>(
        p, [&](i64 s, i64 b) { return gradients.needed[s] ? g[s * p.s.batch + b] * weights[b] : 0.0; }, &gradients,
        static_cast<T*>(nullptr), [](i64, i64, double) {});
    return 0;
  });
  return gradients.tensors;
}

// Rows (N, V) of a teacher.
std::tuple<Tensor, Tensor> softmax_center(const Tensor& logits, const Optional& center, double temperature) {
  const Views views({logits});
  return with_type(is_double(logits), [&](auto zero) {
    using T = decltype(zero);
    const i64 rows = views.batch, width = views.width;
    Tensor p = empty({rows, width}, kScalar<T>), column_mean = empty({width}, kScalar<T>);
    Optional centers;
    if (center)
      centers = dense(*center, kScalar<T>);
    const T* c = center ? data<T>(*centers) : nullptr;
    const i64 threads = std::max<i64>(1, std::min(useful_threads(kFlopsAnElement * rows * width), rows));
    Buffer<double> totals(threads * width);
    T* out = data<T>(p);
    run(threads, [&](i64 t) {
      ColumnSums<T> sums(width, totals + t * width);
      Online online(width, temperature);
      Buffer<T> scratch(kChunk);
      for (i64 i = rows * t / threads; i < rows * (t + 1) / threads; ++i)
        soften<T>(views.row(0, i), width, c, online, sums.next(), out + i * width, nullptr, scratch);
      sums.flush();
    });
    mean_of(totals, threads, width, rows, data<T>(column_mean));
    return std::make_tuple(p, column_mean);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("soft_cross_entropy", TORCH_BOX(&forward));
  library.impl("soft_cross_entropy_", TORCH_BOX(&forward_in_place));
  library.impl("soft_cross_entropy_rows", TORCH_BOX(&rows_forward));
  library.impl("soft_cross_entropy_rows_backward", TORCH_BOX(&rows_backward));
  library.impl("softmax_center", TORCH_BOX(&softmax_center));
}

}  // namespace sslkernels
