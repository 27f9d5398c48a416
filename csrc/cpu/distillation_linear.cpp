// SPDX-License-Identifier: Apache-2.0
// Soft cross-entropy of the logits of a prototype layer, which live in panels.
#include "cpu/distillation_linear.h"

#define SSLKERNELS_LEAVES "cpu/distillation_linear.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

constexpr i64 kStrip = 1024;  // prototypes of one product

Tensor dense(const Tensor& x, ScalarType dtype) { return torch::stable::contiguous(torch::stable::to(x, dtype)); }

template <typename T>
void load_rows(const Tensor& x, i64 view, i64 sample, T factor, T* out) {
  const i64 at = (view * x.stride(0) + sample * x.stride(1)) * static_cast<i64>(x.element_size());
  tiles<T>().load(static_cast<const char*>(x.const_data_ptr()) + at, kind(x), 0, x.stride(2), out, 1, x.size(2),
                  factor);
}

// teacher_weight times the mean of the teacher's rows: the mean of the logits, from D numbers.
template <typename T>
void mean_logits(const Prototypes<T>& p, T* out) {
  const i64 rows = p.teachers * p.batch, d = p.depth;
  std::vector<double> mean(d, 0.0);
  Buffer<T> row(d);
  for (i64 i = 0; i < rows; ++i) {
    load_rows<T>(p.teacher, i / p.batch, i % p.batch, T(1), row);
    SSLKERNELS_AT_LEVEL(add_to<T>(mean.data(), row, d));
  }
  for (double& x : mean) x /= rows;
  over_rows(p.width, kFlopsAnElement * p.width * d, [&](Range mine) {
    Buffer<T> scratch(d);
    i64 ld;
    for (i64 j = mine.begin; j < mine.end; ++j)
      out[j] =
          static_cast<T>(SSLKERNELS_AT_LEVEL(wide_dot(p.teacher_weight.fetch(j, 1, scratch, &ld), mean.data(), d)));
  });
}

}  // namespace

template <typename T>
Prototypes<T>::Prototypes(const Tensor& student, const Tensor& weight, const Tensor& teacher,
                          const Tensor& teacher_weight, const Optional& center, const Optional& row_weight,
                          double student_temp, double teacher_temp, bool exclude, bool mean)
    : student(student),
      teacher(teacher),
      weight(weight),
      teacher_weight(teacher_weight),
      student_temp(student_temp),
      teacher_temp(teacher_temp),
      exclude(exclude),
      teachers(teacher.size(0)),
      batch(student.size(1)),
      width(weight.size(0)),
      depth(weight.size(1)),
      first_view(exclude && teacher.size(0) == 1 ? 1 : 0),
      views(student.size(0) - first_view) {
  if (center)
    centers = dense(*center, kScalar<T>);
  std::vector<double> all(batch, 1.0);
  if (row_weight) {
    const Tensor wide = dense(*row_weight, ScalarType::Double);
    std::copy_n(data<double>(wide), batch, all.begin());
  }
  double total = 0;
  for (const double w : all) total += w;
  if (mean)
    norm = 1 / ((student.size(0) * teachers - (exclude ? std::min(student.size(0), teachers) : 0)) * total);
  for (i64 b = 0; b < batch; ++b) {
    if (all[b] == 0)
      continue;
    active.push_back(b);
    weights.push_back(all[b]);
    shares.push_back(all[b] * norm);
  }
}

template <typename T>
void Prototypes<T>::load_students(Range some, T factor, T* out) const {
  for (i64 v = 0; v < views; ++v) {
    for (i64 i = some.begin; i < some.end; ++i, out += depth)
      load_rows(student, first_view + v, active[i], factor, out);
  }
}

template <typename T>
void Prototypes<T>::load_teachers(Range some, T factor, T* out) const {
  for (i64 v = 0; v < teachers; ++v) {
    for (i64 i = some.begin; i < some.end; ++i, out += depth) load_rows(teacher, v, active[i], factor, out);
  }
}

template <typename T>
const T* Prototypes<T>::center(i64 view) const {
  return centers ? data<T>(*centers) + (centers->size(0) > 1 ? view * width : 0) : nullptr;
}

template <typename T>
double by_panels(const Prototypes<T>& p, i64 samples_a_panel, const PrototypeGradients<T>& out) {
  const i64 d = p.depth, ld = (p.width + 15) / 16 * 16 + 16;  // rows that do not all begin in one set of a cache
  const i64 chunks = (p.samples() + samples_a_panel - 1) / samples_a_panel;
  const i64 most = (p.samples() + chunks - 1) / chunks, rows = most * p.views;
  const i64 threads = useful_threads(2.0 * most * (p.views + p.teachers) * p.width * d);
  const bool gradients = out.student || out.weight;
  constexpr Dtype kOwn = std::is_same_v<T, double> ? Dtype::kDouble : Dtype::kFloat;
  Buffer<T> panel(most * (p.views + p.teachers) * ld), hidden(rows * d), teacher(most * p.teachers * d);
  Buffer<T> strips(threads * kStrip * d), parts(out.student ? 2 * threads * rows * d : 0);
  std::vector<double> losses(p.samples());
  T *const targets = panel, *const logits = targets + most * p.teachers * ld;

  // f(thread, its next prototypes, scratch for their rows)
  const auto over_strips = [&](const auto& f) {
    run(threads, [&](i64 t) {
      const Range mine = part(0, p.width, t, threads);
      for (i64 j = mine.begin; j < mine.end; j += kStrip)
        f(t, Range{j, std::min(mine.end, j + kStrip)}, strips + t * kStrip * d);
    });
  };
  const auto layer = [&](const Operand<T>& weight, Range strip, T* scratch) {
    i64 stride;
    const T* x = weight.fetch(strip.begin, strip.size(), scratch, &stride);
    return View<T>{x, strip.size(), d, stride, 1};
  };

  for (i64 first = 0; first < p.samples(); first += most) {
    const Range some{first, std::min(p.samples(), first + most)};
    const i64 n = some.size(), students = n * p.views;
    p.load_students(some, T(1), hidden);
    p.load_teachers(some, T(1), teacher);
    const View<T> h{hidden, students, d, d, 1}, g{teacher, n * p.teachers, d, d, 1};
    over_strips([&](i64, Range strip, T* scratch) {
      const i64 m = strip.size();
      multiply<T>({targets + strip.begin, g.rows, m, ld, 1}, g, layer(p.teacher_weight, strip, scratch).transposed());
      multiply<T>({logits + strip.begin, h.rows, m, ld, 1}, h, layer(p.weight, strip, scratch).transposed());
    });
    run(std::min(threads, n), [&](i64 t) {
      const auto row = [&](T* rows, i64 v, i64 i) {
        return Row{reinterpret_cast<char*>(rows + (v * n + i) * ld), kOwn, 1};
      };
      Sample<T> sample(p.width, p.teachers, p.student_temp, p.teacher_temp, p.exclude);
      const i64 workers = std::min(threads, n);
      for (i64 i = n * t / workers; i < n * (t + 1) / workers; ++i) {
        for (i64 v = 0; v < p.teachers; ++v) sample.teach(v, row(targets, v, i), p.center(v), nullptr);
        double sum = 0;
        for (i64 v = 0; v < p.views; ++v) {
          const Row x = row(logits, v, i);
          sum += sample.learn(p.first_view + v, x, p.shares[first + i], gradients ? &x : nullptr, false);
        }
        losses[first + i] = p.weights[first + i] * sum;
      }
    });
    if (!gradients)
      continue;
    std::vector<char> started(threads, false);
    over_strips([&](i64 t, Range strip, T* scratch) {
      const View<T> slopes{logits + strip.begin, students, strip.size(), ld, 1};
      if (out.student) {
        T *sum = parts + 2 * t * rows * d, *product = sum + rows * d;
        accumulate<T>({sum, students, d, d, 1}, slopes, layer(p.weight, strip, scratch), started[t], product);
        started[t] = true;
      }
      if (out.weight)
        accumulate<T>({out.weight + strip.begin * d, strip.size(), d, d, 1}, slopes.transposed(), h, first > 0,
                      scratch);
    });
    for (i64 r = 0; out.student && r < students; ++r) {
      T* row = out.student + p.row(r / n, first + r % n) * d;
      std::copy_n(parts + r * d, d, row);
      for (i64 t = 1; t < threads; ++t) {
        if (started[t])
          tiles<T>().add(row, d, parts + (2 * t * rows + r) * d, d, 1, d);
      }
    }
  }
  double total = 0;
  for (const double x : losses) total += x;
  return total;
}

template struct Prototypes<float>;
template struct Prototypes<double>;

namespace {

struct Plan {
  bool tiles;
  i64 samples;  // at a time
};

// The rule of the family: which form, and how many samples at a time. What is kept at a time (the logits of a panel, or
// those of a sweep's teachers) takes about a fifth of all logits, so an eighth of what the unfused form needs; at least
// `panel_bytes`, at most kLarge or an eighth of the prototypes. Within that panels do the fewest products, and tiles
// have more rows in each. Costs are counted in rows of a product with the prototypes: to read and to pack those costs
// what kRead rows more would, to add to their gradient kAdd (both measured with MKL and D = 256).
template <typename T>
Plan plan(const Prototypes<T>& p, bool student, bool weight, i64 panel_bytes) {
  constexpr double kRead = 45, kAdd = 55;
  constexpr i64 kLarge = i64(64) << 20, kRows = 1024;
  const i64 row = p.width * static_cast<i64>(sizeof(T)), n = p.samples();
  const i64 all = n * (p.views + p.teachers) * row;
  const auto bounded = [&](i64 bytes) {
    return std::max(panel_bytes, std::min(bytes, std::max(kLarge, row * p.depth / 8)));
  };
  const auto fit = [&](i64 bytes, i64 rows) { return std::clamp<i64>(bytes / (rows * row), 1, n); };
  const auto cost = [&](bool tiles, i64 samples) {
    const i64 times = (n + samples - 1) / samples;
    const double s = static_cast<double>((n + times - 1) / times * p.views), t = s / p.views * p.teachers;
    double rows = s + t + 2 * kRead;
    if (student)
      rows += s + kRead + (tiles && !weight ? t : 0);
    if (weight)
      rows += s + (tiles ? s + kRead : 0);
    return times * rows + (weight ? (times - 1) * kAdd : 0);
  };
  const i64 panel = fit(bounded(all / 6), p.views + p.teachers);
  const i64 sweep = std::min(fit(bounded(all / 5), p.teachers), std::max<i64>(1, kRows / (p.views + p.teachers)));
  return cost(true, sweep) < cost(false, panel) && p.width > 1 ? Plan{true, sweep} : Plan{false, panel};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_soft_cross_entropy(
    const Tensor& student, const Tensor& weight, const Tensor& teacher, const Optional& teacher_weight,
    const Optional& center, const Optional& row_weight, double student_temp, double teacher_temp, bool exclude,
    bool mean, bool return_center, i64 panel_bytes, std::vector<bool> mask) {
  const Tensor& other = teacher_weight ? *teacher_weight : weight;
  const bool wide = is_double(student) || is_double(weight) || is_double(teacher) || is_double(other);
  return with_type(wide, [&](auto zero) {
    using T = decltype(zero);
    const Prototypes<T> p(student, weight, teacher, other, center, row_weight, student_temp, teacher_temp, exclude,
                          mean);
    Tensor loss = empty({}, kScalar<T>), mean_of_logits = empty({return_center ? p.width : 0}, kScalar<T>);
    Tensor dstudent =
        empty(mask[0] ? std::vector<i64>{student.size(0), p.batch, p.depth} : std::vector<i64>{0}, kScalar<T>);
    Tensor dweight = empty(mask[1] ? std::vector<i64>{p.width, p.depth} : std::vector<i64>{0}, kScalar<T>);
    const i64 rows = p.samples() * p.views;
    if (rows < student.size(0) * p.batch)
      std::fill_n(data<T>(dstudent), dstudent.numel(), T(0));
    double total = 0;
    if (rows > 0) {
      const PrototypeGradients<T> out{mask[0] ? data<T>(dstudent) : nullptr, mask[1] ? data<T>(dweight) : nullptr};
      const Plan chosen = plan(p, mask[0], mask[1], panel_bytes);
      total = (chosen.tiles ? by_tiles<T> : by_panels<T>)(p, chosen.samples, out);
    } else {
      std::fill_n(data<T>(dweight), dweight.numel(), T(0));
    }
    *data<T>(loss) = static_cast<T>(total * p.norm);
    if (return_center)
      mean_logits(p, data<T>(mean_of_logits));
    return std::make_tuple(loss, mean_of_logits, dstudent, dweight);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("linear_soft_cross_entropy", TORCH_BOX(&linear_soft_cross_entropy));
}

}  // namespace sslkernels
