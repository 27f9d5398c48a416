// SPDX-License-Identifier: Apache-2.0
#include "cpu/distillation.h"

#include "cpu/patches.h"

#define SSLKERNELS_LEAVES "cpu/distillation.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

i64 bytes_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

template <typename T>
constexpr Dtype kOwn = std::is_same_v<T, double> ? Dtype::kDouble : Dtype::kFloat;

template <typename T>
bool is_dense(const Row& row) {
  return row.dtype == kOwn<T> && row.stride == 1;
}

char* element(const Row& row, i64 at) { return row.data + at * row.stride * bytes_of(row.dtype); }

// n elements of the row: where they lie, or converted into `scratch`
template <typename T>
const T* fetch(const Row& row, i64 first, i64 n, T* scratch) {
  if (is_dense<T>(row))
    return reinterpret_cast<const T*>(element(row, first));
  tiles<T>().load(element(row, first), row.dtype, 0, row.stride, scratch, 1, n, T(1));
  return scratch;
}

// To dense memory that nobody reads soon, without reading the lines first where they are whole.
void write_past_caches(const void* src, char* dst, i64 bytes) {
  const i64 head = std::min(bytes, static_cast<i64>(-reinterpret_cast<uintptr_t>(dst) % 64));
  const i64 whole = (bytes - head) / 64 * 64;
  const char* from = static_cast<const char*>(src);
  std::memcpy(dst, from, head);
  stream(from + head, dst + head, whole);
  std::memcpy(dst + head + whole, from + head + whole, bytes - head - whole);
}

// n elements into the row, from `first` on; `scratch` may be where they are converted
template <typename T>
void write(const T* values, const Row& row, i64 first, i64 n, bool past_caches, T* scratch) {
  char* to = element(row, first);
  if (past_caches && row.stride == 1) {
    if (!is_dense<T>(row))
      tiles<T>().store(values, scratch, row.dtype, 0, 1, n);
    return write_past_caches(is_dense<T>(row) ? values : scratch, to, n * bytes_of(row.dtype));
  }
  // a row of n elements, or n rows of one
  if (row.stride == 1)
    tiles<T>().store(values, to, row.dtype, 0, 1, n);
  else
    tiles<T>().store(values, to, row.dtype, row.stride, n, 1);
}

// f(chunk, its first element, its length)
template <typename F>
void over_chunks(i64 width, const F& f) {
  for (i64 c = 0, first = 0; first < width; ++c, first += kChunk) f(c, first, std::min(kChunk, width - first));
}

template <typename T>
i64 count(const T* x, i64 n, T value) {
  return SSLKERNELS_AT_LEVEL(count_equal(x, n, value));
}

constexpr double kLog2E = 1.4426950408889634;

i64 chunks_in(i64 width) { return (width + kChunk - 1) / kChunk; }

}  // namespace

Views::Views(const std::vector<Tensor>& xs) {
  for (const Tensor& x : xs) {
    const i64 d = x.dim() - 2, bytes = static_cast<i64>(x.element_size());
    for (i64 view = 0; view < (d ? x.size(0) : 1); ++view) {
      char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + (d ? view * x.stride(0) * bytes : 0);
      views_.push_back({data, x.stride(d) * bytes, x.stride(d + 1), kind(x)});
    }
    batch = x.size(d);
    width = x.size(d + 1);
  }
}

Online::Online(i64 width, double temperature) : inverse_(1 / temperature), refs_(chunks_in(width)) {}

void Online::start() {
  max_ = kNone<double>;
  rest_ = ties_ = 0;
  peak_ = 0;
}

double Online::reference(i64 c, double top) {
  if (top > max_) {
    rest_ = (rest_ + ties_) * std::exp((max_ - top) * inverse_);
    ties_ = 0;
    max_ = top;
    peak_ = c;
  }
  refs_[c] = max_;
  return max_ == kNone<double> ? 0.0 : max_;  // exp(-inf - 0) is zero
}

double Online::share(i64 c) const {
  const double x = (refs_[c] - max_) * inverse_;
  return x < -70 ? 0.0 : std::exp(x);  // beyond, products with exponentials are denormals or zero
}

template <typename T>
void soften(const Row& row, i64 width, const T* center, Online& online, T* sum, T* out, double* sums, T* scratch) {
  const NoDenormals here;
  const T factor = static_cast<T>(online.inverse() * kLog2E);
  online.start();
  over_chunks(width, [&](i64 c, i64 first, i64 n) {
    const T* x = fetch(row, first, n, scratch);
    T* e = out + first;
    if (sum)
      SSLKERNELS_AT_LEVEL(plus(sum + first, x, n, sum + first));
    T top;
    if (center) {
      top = SSLKERNELS_AT_LEVEL(shift(x, center + first, n, e));
      x = e;
    } else {
      top = SSLKERNELS_AT_LEVEL(largest(x, n));
    }
    const T ref = static_cast<T>(online.reference(c, top));
    if (top == ref)
      online.add(SSLKERNELS_AT_LEVEL(exponentials<true>(x, n, ref, factor, e)), count(x, n, ref));
    else
      online.add(SSLKERNELS_AT_LEVEL(exponentials<false>(x, n, ref, factor, e)), 0);
  });
  over_chunks(width, [&](i64 c, i64 first, i64 n) {
    const T share = static_cast<T>(online.share(c) / (1 + online.excess()));
    const T of_chunk = SSLKERNELS_AT_LEVEL(scale(out + first, n, share));
    if (sums)
      sums[c] = of_chunk;
  });
}

template <typename T>
Sample<T>::Sample(i64 width, i64 teachers, double student_temp, double teacher_temp, bool exclude)
    : width_(width),
      chunks_(chunks_in(width)),
      teachers_(teachers),
      exclude_(exclude),
      teacher_(width, teacher_temp),
      student_(width, student_temp),
      p_(teachers * width),
      all_(teachers > 1 ? width : 0),
      others_(teachers > 2 && exclude ? width : 0),
      e_(width),
      scratch_(2 * kChunk),
      p_sums_(teachers * chunks_),
      all_sums_(chunks_),
      other_sums_(chunks_),
      dots_(chunks_) {}

template <typename T>
void Sample<T>::teach(i64 t, const Row& row, const T* center, T* sum) {
  soften<T>(row, width_, center, teacher_, sum, p_ + t * width_, p_sums_.data() + t * chunks_, scratch_);
  added_ = false;
}

// The sum of all teachers but `skip`, of which there are two or more.
template <typename T>
typename Sample<T>::Target Sample<T>::add_up(i64 skip, T* out, std::vector<double>& sums) const {
  const i64 first = skip == 0 ? 1 : 0;
  const T* sum = p_ + first * width_;
  i64 number = 1;
  for (i64 t = first + 1; t < teachers_; ++t) {
    if (t == skip)
      continue;
    over_chunks(width_, [&](i64 c, i64 at, i64 n) {
      sums[c] = SSLKERNELS_AT_LEVEL(plus<T>(sum + at, p_ + t * width_ + at, n, out + at));
    });
    sum = out;
    ++number;
  }
  return {out, sums.data(), static_cast<double>(number)};
}

template <typename T>
typename Sample<T>::Target Sample<T>::target(i64 s) {
  const i64 number = teachers_ - (exclude_ && s < teachers_ ? 1 : 0);
  if (number == 0)
    return {nullptr, nullptr, 0};
  if (number == 1) {
    const i64 t = teachers_ == 1 ? 0 : 1 - s;
    return {p_ + t * width_, p_sums_.data() + t * chunks_, 1};
  }
  if (number < teachers_)
    return add_up(s, others_, other_sums_);
  if (!added_)
    add_up(-1, all_, all_sums_);
  added_ = true;
  return {all_, all_sums_.data(), static_cast<double>(number)};
}

// number softmax(x) - p at the largest x, element `at`: minus the sum of the others
template <typename T>
double Sample<T>::own_slope(const Target& target, i64 at) const {
  const i64 first = student_.peak() * kChunk, n = std::min(kChunk, width_ - first), before = at - first;
  double others = SSLKERNELS_AT_LEVEL(total(target.p + first, before));
  others += SSLKERNELS_AT_LEVEL(total(target.p + at + 1, n - before - 1));
  for (i64 c = 0; c < chunks_; ++c) others += c == student_.peak() ? 0.0 : target.sums[c];
  const double excess = student_.excess();
  return others - target.number * (excess / (1 + excess));
}

template <typename T>
double Sample<T>::learn(i64 s, const Row& row, double weight, const Row* gradient, bool past_caches) {
  const Target wanted = target(s);
  if (wanted.number == 0) {
    if (gradient)
      clear(*gradient, width_);
    return 0;
  }
  const NoDenormals here;
  Online& online = student_;
  const T factor = static_cast<T>(online.inverse() * kLog2E);
  online.start();
  over_chunks(width_, [&](i64 c, i64 first, i64 n) {
    const T* x = fetch<T>(row, first, n, scratch_);
    const T top = SSLKERNELS_AT_LEVEL(largest(x, n)), ref = static_cast<T>(online.reference(c, top));
    T dot, *e = e_ + (gradient ? first : 0);
    if (top == ref)
      online.add(SSLKERNELS_AT_LEVEL(compare<true>(x, wanted.p + first, n, ref, factor, e, &dot)), count(x, n, ref));
    else
      online.add(SSLKERNELS_AT_LEVEL(compare<false>(x, wanted.p + first, n, ref, factor, e, &dot)), 0);
    dots_[c] = dot;
  });
  double value = 0;
  for (i64 c = 0; c < chunks_; ++c) value += dots_[c] + online.lag(c) * wanted.sums[c];
  const double excess = online.excess();
  value = value * online.inverse() + wanted.number * std::log1p(excess);
  if (!gradient)
    return value;

  const double steep = weight * online.inverse();
  const bool alone = excess < 1;  // one element has most of the mass; its exponential is the only 1
  over_chunks(width_, [&](i64 c, i64 first, i64 n) {
    const T a = static_cast<T>(steep * wanted.number * online.share(c) / (1 + excess)), b = static_cast<T>(steep);
    const bool dense = is_dense<T>(*gradient) && !past_caches;
    T* out = dense ? reinterpret_cast<T*>(element(*gradient, first)) : scratch_ + kChunk;
    SSLKERNELS_AT_LEVEL(slopes<T>(e_ + first, wanted.p + first, n, a, b, out));
    if (alone && c == online.peak()) {
      const i64 at = SSLKERNELS_AT_LEVEL(find<T>(e_ + first, n, 1));
      if (at < n)
        out[at] = static_cast<T>(steep * own_slope(wanted, first + at));
    }
    if (!dense)
      write<T>(out, *gradient, first, n, past_caches, scratch_);
  });
  return value;
}

template <typename T>
ColumnSums<T>::ColumnSums(i64 width, double* total) : width_(width), total_(total), block_(width) {
  std::fill_n(total_, width, 0.0);
  std::fill_n(static_cast<T*>(block_), width, T(0));
}

template <typename T>
T* ColumnSums<T>::next() {
  constexpr i64 kRows = 32;
  if (rows_ == kRows)
    flush();
  ++rows_;
  return block_;
}

template <typename T>
void ColumnSums<T>::flush() {
  SSLKERNELS_AT_LEVEL(move_to<T>(total_, block_, width_));
  rows_ = 0;
}

void clear(const Row& row, i64 width) {
  const i64 bytes = bytes_of(row.dtype);
  if (row.stride == 1)
    std::memset(row.data, 0, width * bytes);
  else
    for (i64 j = 0; j < width; ++j) std::memset(element(row, j), 0, bytes);
}

template void soften(const Row&, i64, const float*, Online&, float*, float*, double*, float*);
template void soften(const Row&, i64, const double*, Online&, double*, double*, double*, double*);
template class Sample<float>;
template class Sample<double>;
template class ColumnSums<float>;
template class ColumnSums<double>;

}  // namespace sslkernels
