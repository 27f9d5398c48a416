// SPDX-License-Identifier: Apache-2.0
// Soft cross-entropy of the logits of a prototype layer, in tiles that never leave the cache.
//
// The teachers' logits of a group of samples are kept, whose softmax must be known before a student meets it. The
// students' come by tiles. With a gradient of the prototypes they are computed twice: a first sweep finds each row's
// log-sum-exp, a second the slopes, with which a strip of that gradient is finished at once. Without it one sweep is
// enough: a student's gradient is the difference of two weighted means of prototypes, one by the student's softmax,
// whose exponentials are taken against the largest logit so far, one by the teachers'.
//
// One prototype of each row is kept out of all this, the teachers' favourite: where the student agrees with a sure
// teacher, it has nearly all of both masses, and what is left are sums over the others, which do not cancel. Its slope
// is minus the sum of the others'.
#include "cpu/distillation_linear.h"

#define SSLKERNELS_LEAVES "cpu/distillation_linear_tiles.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

template <typename T>
class Sweeps {
 public:
  Sweeps(const Prototypes<T>& p, i64 samples, const PrototypeGradients<T>& out)
      : p_(p),
        out_(out),
        d_(p.depth),
        students_(samples * p.views),
        rows_(samples * (p.views + p.teachers)),
        threads_(useful_threads(2.0 * rows_ * p.width * p.depth)),
        emit_(out.student && !out.weight),
        strips_(p.width, d_, threads_, std::clamp<i64>(kTileBytes / (rows_ * i64(sizeof(T))) / 16 * 16, 128, 512),
                out.student ? (emit_ ? rows_ : students_) : 0),
        hidden_(students_ * d_),
        teacher_(samples * p.teachers * d_),
        panel_(samples * p.teachers * p.width),
        tiles_(threads_ * (rows_ + 1) * strips_.widest) {
    for (i64 v = 0; v < p.views; ++v) {
      const i64 view = p.first_view + v, without = p.exclude && view < p.teachers ? view : -1;
      const auto same = std::find(left_out_.begin(), left_out_.end(), without);
      target_of_.push_back(same - left_out_.begin());
      if (same == left_out_.end())
        left_out_.push_back(without);
    }
  }

  // The weighted losses of some samples
  double visit(Range some) {
    some_ = some;
    n_ = some.size();
    p_.load_students(some, static_cast<T>(1 / p_.student_temp), hidden_);
    p_.load_teachers(some, static_cast<T>(1 / p_.teacher_temp), teacher_);
    strips_.forget_sums();
    find_teachers();
    find_favourites();
    strips_.over([&](i64 t, Range strip) { meet(t, strip); });
    const double total = join();
    if (emit_) {
      finish_emitted();
    } else if (out_.student || out_.weight) {
      slopes_.assign(threads_ * n_ * p_.views, 0.0);
      strips_.over([&](i64 t, Range strip) { differentiate(t, strip); });
      finish();
    }
    return total;
  }

 private:
  static constexpr i64 kTileBytes = i64(3) << 18;
  static constexpr double kNothing = sizeof(T) == 4 ? 70 : 690;

  i64 targets() const { return static_cast<i64>(left_out_.size()); }
  bool meets(i64 target, i64 teacher) const { return left_out_[target] != teacher; }
  double number(i64 target) const { return static_cast<double>(p_.teachers - (left_out_[target] < 0 ? 0 : 1)); }

  // Rows of teachers come before those of students in a thread's tile, and a row for a sum of teachers behind them.
  T* tile(i64 t) const { return tiles_ + t * (rows_ + 1) * strips_.widest; }
  T* panel(Range strip) const { return panel_ + strip.begin * n_ * p_.teachers; }

  // The teachers' logits over their temperature, the softmax of each, and its favourite
  void find_teachers() {
    const i64 rows = n_ * p_.teachers;
    std::vector<Partial> partial(threads_ * rows);
    std::vector<i64> at(threads_ * rows, 0);
    strips_.over([&](i64 t, Range strip) {
      const i64 m = strip.size();
      T* x = panel(strip);
      multiply<T>({x, rows, m, m, 1}, {teacher_, rows, d_, d_, 1},
                  strips_.layer(p_.teacher_weight, t, strip).transposed());
      for (i64 r = 0; r < rows; ++r, x += m) {
        if (const T* center = p_.center(r / n_))
          SSLKERNELS_AT_LEVEL(subtract(x, center + strip.begin, static_cast<T>(1 / p_.teacher_temp), m));
        Partial& own = partial[t * rows + r];
        const T top = SSLKERNELS_AT_LEVEL(largest(x, m));
        if (top > own.max)
          at[t * rows + r] = strip.begin + (std::find(x, x + m, top) - x);
        own.raise(top);
        own.sum += SSLKERNELS_AT_LEVEL(sum_exponentials(x, m, static_cast<T>(own.max)));
      }
    });
    top_.assign(rows, 0.0);
    peak_.assign(rows, 0.0);
    favourite_.assign(rows, 0);
    for (i64 r = 0; r < rows; ++r) {
      Partial all = partial[r];
      favourite_[r] = at[r];
      for (i64 t = 1; t < threads_; ++t) {
        const Partial& other = partial[t * rows + r];
        if (other.max > all.max)
          favourite_[r] = at[t * rows + r];
        all.raise(other.max);
        all.sum += other.sum * (other.max == all.max ? 1 : std::exp(other.max - all.max));
      }
      top_[r] = all.max;
      peak_[r] = 1 / all.sum;
    }
  }

  // For each sample and target the favourite of the surest teacher in it; the students' logits there
  void find_favourites() {
    const i64 count = targets();
    hole_.assign(n_ * count, 0);
    for (i64 i = 0; i < n_; ++i) {
      for (i64 k = 0; k < count; ++k) {
        double best = -1;
        for (i64 v = 0; v < p_.teachers; ++v) {
          if (meets(k, v) && peak_[v * n_ + i] > best) {
            best = peak_[v * n_ + i];
            hole_[i * count + k] = favourite_[v * n_ + i];
          }
        }
      }
    }
    Buffer<T> scratch(d_);
    at_hole_.assign(n_ * p_.views, 0.0);
    for (i64 r = 0; r < n_ * p_.views; ++r) at_hole_[r] = dot(prototype(hole(r), scratch), hidden_ + r * d_);
    seen_.assign(threads_ * n_ * count, 0.0);
    partial_.assign(threads_ * n_ * p_.views, {});
    along_.assign(threads_ * n_ * p_.views, 0.0);
    mass_.assign(n_ * count * p_.teachers, 0.0);
  }

  const T* prototype(i64 j, T* scratch) const {
    i64 ld;
    return p_.weight.fetch(j, 1, scratch, &ld);
  }

  double dot(const T* a, const T* b) const {
    double sum = 0;
    for (i64 j = 0; j < d_; ++j) sum += static_cast<double>(a[j]) * b[j];
    return sum;
  }

  i64 sample(i64 row) const { return row % n_; }
  i64 target(i64 row) const { return target_of_[row / n_]; }
  // the number of a sample's target among all
  i64 meeting(i64 row) const { return sample(row) * targets() + target(row); }
  i64 hole(i64 row) const { return hole_[meeting(row)]; }

  // The probabilities of a tile's teachers, for tile(t)
  void probabilities(i64 t, Range strip) const {
    const i64 m = strip.size();
    const T* x = panel(strip);
    for (i64 r = 0; r < n_ * p_.teachers; ++r)
      SSLKERNELS_AT_LEVEL(
          exponentials(x + r * m, m, static_cast<T>(top_[r]), static_cast<T>(peak_[r]), tile(t) + r * m));
  }

  // The logits of a tile's students, over their temperature
  T* logits(i64 t, Range strip, const View<T>& weight) const {
    const i64 m = strip.size(), rows = n_ * p_.views;
    T* x = tile(t) + n_ * p_.teachers * m;
    multiply<T>({x, rows, m, m, 1}, {hidden_, rows, d_, d_, 1}, weight.transposed());
    return x;
  }

  // What target k of a sample has in a tile: the row of its only teacher, or their sum
  const T* target_row(i64 t, i64 m, i64 i, i64 k) const {
    T* sum = tile(t) + n_ * (p_.teachers + p_.views) * m;
    const T* only = nullptr;
    for (i64 v = 0; v < p_.teachers; ++v) {
      if (!meets(k, v))
        continue;
      const T* p = tile(t) + (v * n_ + i) * m;
      if (only == nullptr) {
        only = p;
        continue;
      }
      if (only != sum)
        std::copy_n(only, m, sum);
      SSLKERNELS_AT_LEVEL(add(sum, p, m));
      only = sum;
    }
    return only;
  }

  // f(row, its target, where in the tile its favourite is) for the students of each sample, then g(sample's target, the
  // same) for each target
  template <typename F, typename G>
  void over_students(i64 t, Range strip, const F& f, const G& g) const {
    for (i64 at = 0; at < n_ * targets(); ++at) {
      const i64 i = at / targets(), k = at % targets(), hole = hole_[at] - strip.begin;
      const T* p = target_row(t, strip.size(), i, k);
      for (i64 v = 0; v < p_.views; ++v) {
        if (target_of_[v] == k)
          f(v * n_ + i, p, hole);
      }
      g(at, p, hole);
    }
  }

  // First sweep: log-sum-exp and loss of each row, and where it is the only sweep, the weighted means
  void meet(i64 t, Range strip) {
    const i64 m = strip.size(), students = n_ * p_.views, teachers = n_ * p_.teachers;
    const View<T> weight = strips_.layer(p_.weight, t, strip);
    probabilities(t, strip);
    T* x = logits(t, strip, weight);
    double* seen = seen_.data() + t * n_ * targets();
    const auto compare_row = [&](i64 row, const T* p, i64 hole) {
      T* own = x + row * m;
      T top = kNone<T>;
      around(hole, m, [&](i64 at, i64 n) { top = std::max(top, SSLKERNELS_AT_LEVEL(largest(own + at, n))); });
      Partial& partial = partial_[t * students + row];
      double& along = along_[t * students + row];
      const double before = partial.max, factor = partial.raise(top);
      if (before != partial.max && before != kNone<double>) {
        along += (partial.max - before) * seen[meeting(row)];
        if (strips_.has_sum(t)) {
          T *sum = strips_.sum(t) + (teachers + row) * d_, f = static_cast<T>(factor);
          tiles<T>().scale_rows(sum, d_, sum, d_, &f, 1, d_);
        }
      }
      const T ref = static_cast<T>(partial.max);
      around(hole, m, [&](i64 at, i64 n) {
        T dot;
        partial.sum += SSLKERNELS_AT_LEVEL(compare<T>(own + at, p + at, n, ref, emit_, &dot));
        along += dot;
      });
      if (emit_ && hole >= 0 && hole < m)
        own[hole] = 0;
    };
    over_students(t, strip, compare_row, [&](i64 at, const T* p, i64 hole) {
      around(hole, m, [&](i64 first, i64 n) { seen[at] += SSLKERNELS_AT_LEVEL(total(p + first, n)); });
      for (i64 v = 0; hole >= 0 && hole < m && v < p_.teachers; ++v)
        mass_[at * p_.teachers + v] = tile(t)[(v * n_ + at / targets()) * m + hole];
    });
    if (!emit_)
      return;
    for (i64 r = 0; r < teachers; ++r) {
      if (favourite_[r] >= strip.begin && favourite_[r] < strip.end)
        tile(t)[r * m + favourite_[r] - strip.begin] = 0;
    }
    strips_.add_product(t, {tile(t), teachers + students, m, m, 1}, weight);
  }

  // Joins what the threads know of each row
  double join() {
    const i64 students = n_ * p_.views, meetings = n_ * targets();
    rest_.assign(meetings, 0.0);
    for (i64 i = 0; i < threads_ * meetings; ++i) rest_[i % meetings] += seen_[i];
    reference_.assign(students, 0.0);
    share_.assign(students, 0.0);
    others_.assign(students, 0.0);
    double total = 0;
    for (i64 row = 0; row < students; ++row) {
      Partial all;
      for (i64 t = 0; t < threads_; ++t) all.raise(partial_[t * students + row].max);
      double along = 0;
      for (i64 t = 0; t < threads_; ++t) {
        const Partial& own = partial_[t * students + row];
        const double lag = own.max == kNone<double> ? 0 : all.max - own.max;
        all.sum += own.sum * std::exp(-lag);
        along += along_[t * students + row] + lag * seen_[t * meetings + meeting(row)];
      }
      // lse - x at the favourite, which is small where that has most of the mass
      const double gap = at_hole_[row] - all.max;
      const double above = gap > 0 ? std::log1p(all.sum * std::exp(-gap)) : std::log(all.sum + std::exp(gap)) - gap;
      reference_[row] = all.max;
      share_[row] = above + gap > kNothing ? 0 : std::exp(-(above + gap));  // products with less are denormals
      others_[row] = all.sum * std::exp(-(above + gap));
      const double rest = rest_[meeting(row)], sure = number(target(row)) - rest;
      total += p_.weights[some_.begin + sample(row)] * (along + rest * (above + gap) + sure * above);
    }
    return total;
  }

  // Second sweep: slopes, and what the gradients make of them
  void differentiate(i64 t, Range strip) {
    const i64 m = strip.size(), students = n_ * p_.views;
    const View<T> weight = strips_.layer(p_.weight, t, strip);
    probabilities(t, strip);
    T* x = logits(t, strip, weight);
    const auto differentiate_row = [&](i64 row, const T* p, i64 hole) {
      T* own = x + row * m;
      const double weight_of_row = p_.shares[some_.begin + sample(row)];
      const T a = static_cast<T>(weight_of_row * number(target(row)) * share_[row]), b = static_cast<T>(weight_of_row);
      const T ref = static_cast<T>(reference_[row]);
      around(hole, m, [&](i64 at, i64 n) {
        slopes_[t * students + row] += SSLKERNELS_AT_LEVEL(slopes<T>(own + at, p + at, n, ref, a, b));
      });
      if (hole >= 0 && hole < m)
        own[hole] = 0;
    };
    over_students(t, strip, differentiate_row, [](i64, const T*, i64) {});
    const View<T> slopes{x, students, m, m, 1};
    if (out_.student)
      strips_.add_product(t, slopes, weight);
    accumulate<T>({out_.weight + strip.begin * d_, m, d_, d_, 1}, slopes.transposed(), {hidden_, students, d_, d_, 1},
                  some_.begin > 0, strips_.room(t));
  }

  // Adds the favourites, and puts the threads' sums together
  void finish() {
    const i64 students = n_ * p_.views;
    Buffer<T> scratch(d_);
    for (i64 row = 0; row < students; ++row) {
      double slope = 0;
      for (i64 t = 0; t < threads_; ++t) slope -= slopes_[t * students + row];
      tiles<T>().axpy(out_.weight + hole(row) * d_, static_cast<T>(slope), hidden_ + row * d_, d_);
      if (!out_.student)
        continue;
      T* out = strips_.sum(0) + row * d_;
      for (i64 t = 1; t < threads_; ++t) {
        if (strips_.has_sum(t))
          tiles<T>().axpy(out, T(1), strips_.sum(t) + row * d_, d_);
      }
      tiles<T>().axpy(out, static_cast<T>(slope), prototype(hole(row), scratch), d_);
      store(row, out, 1 / p_.student_temp);
    }
  }

  void store(i64 row, const T* x, double factor) const {
    const T f = static_cast<T>(factor);
    tiles<T>().scale_rows(out_.student + p_.row(row / n_, some_.begin + sample(row)) * d_, d_, x, d_, &f, 1, d_);
  }

  // number softmax W - sum_t p_t W, whose favourites are not in the sums
  void finish_emitted() {
    const i64 students = n_ * p_.views, teachers = n_ * p_.teachers;
    Buffer<T> scratch(d_), sum(d_);
    for (i64 t = 1; t < threads_; ++t) {
      if (strips_.has_sum(t))
        tiles<T>().axpy(strips_.sum(0), T(1), strips_.sum(t), teachers * d_);
    }
    for (i64 row = 0; row < students; ++row) {
      const i64 i = sample(row), k = target(row), at = i * targets() + k;
      std::fill_n(static_cast<T*>(sum), d_, T(0));
      for (i64 v = 0; v < p_.teachers; ++v) {
        if (!meets(k, v))
          continue;
        const i64 r = v * n_ + i;
        tiles<T>().axpy(sum, T(-1), strips_.sum(0) + r * d_, d_);
        if (favourite_[r] != hole_[at]) {
          tiles<T>().axpy(sum, static_cast<T>(-peak_[r]), prototype(favourite_[r], scratch), d_);
          tiles<T>().axpy(sum, static_cast<T>(mass_[at * p_.teachers + v]), prototype(hole_[at], scratch), d_);
        }
      }
      for (i64 t = 0; t < threads_; ++t) {
        const double factor = number(k) * share_[row] * std::exp(partial_[t * students + row].max - reference_[row]);
        if (strips_.has_sum(t))
          tiles<T>().axpy(sum, static_cast<T>(factor), strips_.sum(t) + (teachers + row) * d_, d_);
      }
      const double slope = rest_[at] - number(k) * others_[row];
      tiles<T>().axpy(sum, static_cast<T>(slope), prototype(hole_[at], scratch), d_);
      store(row, sum, p_.shares[some_.begin + i] / p_.student_temp);
    }
  }

  const Prototypes<T>& p_;
  const PrototypeGradients<T>& out_;
  const i64 d_, students_, rows_, threads_;
  const bool emit_;
  Strips<T> strips_;  // a thread sums products of the students, and of the teachers where they are emitted
  Buffer<T> hidden_, teacher_, panel_, tiles_;
  std::vector<i64> left_out_, target_of_;  // the teacher that each target is without, or -1; the target of each view
  Range some_{0, 0};
  i64 n_ = 0;
  std::vector<double> top_, peak_;          // of teacher rows
  std::vector<i64> favourite_, hole_;       // of teacher rows; of samples and targets
  std::vector<double> seen_, rest_, mass_;  // of samples and targets
  std::vector<Partial> partial_;            // of student rows, from here on
  std::vector<double> along_, at_hole_, reference_, share_, others_, slopes_;
};

}  // namespace

template <typename T>
double by_tiles(const Prototypes<T>& p, i64 samples_a_sweep, const PrototypeGradients<T>& out) {
  const i64 groups = (p.samples() + samples_a_sweep - 1) / samples_a_sweep;
  const i64 most = (p.samples() + groups - 1) / groups;
  Sweeps<T> sweeps(p, most, out);
  double total = 0;
  for (i64 first = 0; first < p.samples(); first += most)
    total += sweeps.visit({first, std::min(p.samples(), first + most)});
  return total;
}

template double by_tiles(const Prototypes<float>&, i64, const PrototypeGradients<float>&);
template double by_tiles(const Prototypes<double>&, i64, const PrototypeGradients<double>&);

}  // namespace sslkernels
