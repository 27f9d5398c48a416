// SPDX-License-Identifier: Apache-2.0
// Regression of hidden targets: each row that counts is normalised, compared and differentiated in one visit.
#include "cpu/regression.h"

#include <string>

#define SSLKERNELS_LEAVES "cpu/regression.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

// The rows of a tensor (..., D) of any strides and dtype.
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : data_(static_cast<const char*>(x.const_data_ptr())),
        bytes_(static_cast<i64>(x.element_size())),
        dtype_(kind(x)) {
    const i64 last = x.dim() - 1;
    width = x.size(last);
    col_stride_ = x.stride(last);
    for (i64 d = 0; d < last; ++d) {
      count *= x.size(d);
      // dimensions that lie in memory as one are one
      if (!dims_.empty() && dims_.back().stride == x.stride(d) * x.size(d))
        dims_.back() = {dims_.back().size * x.size(d), x.stride(d)};
      else
        dims_.push_back({x.size(d), x.stride(d)});
    }
  }

  // Row `at` where it lies if it can be read there, else converted into `scratch`.
  template <typename T>
  const T* fetch(i64 at, T* scratch) const {
    i64 offset = 0;
    for (auto d = dims_.rbegin(); d != dims_.rend(); ++d) {
      offset += at % d->size * d->stride;
      at /= d->size;
    }
    const char* row = data_ + offset * bytes_;
    if (dtype_ == (std::is_same_v<T, double> ? Dtype::kDouble : Dtype::kFloat) && (col_stride_ == 1 || width == 1))
      return reinterpret_cast<const T*>(row);
    tiles<T>().load(row, dtype_, 0, col_stride_, scratch, 1, width, T(1));
    return scratch;
  }

 private:
  struct Dim {
    i64 size, stride;
  };
  const char* data_;
  i64 bytes_, col_stride_;
  Dtype dtype_;
  std::vector<Dim> dims_;

 public:
  i64 width, count = 1;
};

// Which rows count, and where their targets are; ids are checked before anything is written.
class Index {
 public:
  Index(const Tensor& target, const Optional& index) {
    if (!index)
      return;
    tensor_ = torch::stable::contiguous(*index);
    if (index->scalar_type() == ScalarType::Bool) {
      counts_ = static_cast<const uint8_t*>(tensor_->const_data_ptr());
      return;
    }
    ids_ = static_cast<const i64*>(tensor_->const_data_ptr());
    length_ = target.size(1);
    const i64 rows = tensor_->numel();
    per_sample_ = rows ? rows / target.size(0) : 1;
    for (i64 i = 0; i < rows; ++i) {
      STD_TORCH_CHECK(ids_[i] >= 0 && ids_[i] < length_, "masked_regression: ids must be in [0, ", length_, "), got ",
                      ids_[i]);
    }
  }

  bool counts(i64 row) const { return !counts_ || counts_[row]; }
  i64 target(i64 row) const { return ids_ ? row / per_sample_ * length_ + ids_[row] : row; }
  i64 total(i64 rows) const { return counts_ ? rows - std::count(counts_, counts_ + rows, 0) : rows; }

 private:
  Optional tensor_;
  const uint8_t* counts_ = nullptr;
  const i64* ids_ = nullptr;
  i64 length_ = 0, per_sample_ = 1;
};

template <typename T>
Regression<T> regression(const std::string& loss, double beta, bool normalize_target, double eps) {
  constexpr T kSmallest = std::numeric_limits<T>::min();
  const Distance distance = loss == "l1" || (loss == "smooth_l1" && beta < kSmallest) ? Distance::kL1
                            : loss == "l2"                                            ? Distance::kL2
                            : loss == "smooth_l1"                                     ? Distance::kSmoothL1
                            : loss == "cosine"                                        ? Distance::kCosine
                                                                                      : Distance::kNormalizedL2;
  return {distance, normalize_target, static_cast<T>(beta), std::max(static_cast<T>(eps), kSmallest)};
}

// f(row, value) with the value of each row that counts, 0 of the others; their gradients into the rows of `grad`, dense
// (rows, D) of any dtype, unless it is null.
template <typename T, typename W, typename F>
void visit(const Tensor& pred, const Tensor& target, const Index& index, const Regression<T>& r, const W& weight,
           const Tensor* grad, const F& f) {
  const Rows p(pred), t(target);
  const i64 n = p.width;
  char* out = grad ? static_cast<char*>(grad->mutable_data_ptr()) : nullptr;
  const i64 bytes = grad ? static_cast<i64>(grad->element_size()) : 0;
  const bool direct = grad && grad->scalar_type() == kScalar<T>;
  over_rows(p.count, kFlopsAnElement * p.count * n, [&](Range rows) {
    Buffer<T> scratch(3 * n);
    T *own = scratch, *other = scratch + n, *rounded = scratch + 2 * n;
    for (i64 i = rows.begin; i < rows.end; ++i) {
      char* row = out + i * n * bytes;
      if (!index.counts(i)) {
        f(i, T(0));
        if (grad)
          std::memset(row, 0, n * bytes);
        continue;
      }
      T* slopes = !grad ? nullptr : direct ? reinterpret_cast<T*>(row) : rounded;
      f(i, SSLKERNELS_AT_LEVEL(regress(r, p.fetch(i, own), t.fetch(index.target(i), other), n, weight(i), slopes)));
      if (grad && !direct)
        tiles<T>().store(rounded, row, kind(*grad), n, 1, n);
    }
  });
}

std::vector<i64> sizes(const Tensor& x, i64 count) {
  std::vector<i64> out(count);
  for (i64 d = 0; d < count; ++d) out[d] = x.size(d);
  return out;
}

std::tuple<Tensor, Tensor> masked_regression(const Tensor& pred, const Tensor& target, const Optional& index_tensor,
                                             std::string loss, double beta, bool normalize_target, double eps,
                                             double scale, bool mean, bool need_gradient) {
  const Index index(target, index_tensor);
  return with_type(pred, target, [&](auto zero) {
    using T = decltype(zero);
    const i64 rows = pred.numel() / pred.size(pred.dim() - 1);
    const double weight = mean ? scale / index.total(rows) : scale;
    Tensor result = empty({}, kScalar<T>);
    Tensor dpred = empty(need_gradient ? sizes(pred, pred.dim()) : std::vector<i64>{0}, kScalar<T>);
    Buffer<T> values(rows);
    visit<T>(
        pred, target, index, regression<T>(loss, beta, normalize_target, eps),
        [&](i64) { return static_cast<T>(weight); }, need_gradient ? &dpred : nullptr,
        [&](i64 i, T value) { values[i] = value; });
    double total = 0;
    for (i64 i = 0; i < rows; ++i) total += values[i];
    *data<T>(result) = static_cast<T>(total * weight);
    return std::make_tuple(result, dpred);
  });
}

Tensor rows_forward(const Tensor& pred, const Tensor& target, const Optional& index_tensor, std::string loss,
                    double beta, bool normalize_target, double eps) {
  const Index index(target, index_tensor);
  return with_type(pred, target, [&](auto zero) {
    using T = decltype(zero);
    Tensor result = empty(sizes(pred, pred.dim() - 1), kScalar<T>);
    T* values = data<T>(result);
    visit<T>(
        pred, target, index, regression<T>(loss, beta, normalize_target, eps), [](i64) { return T(0); }, nullptr,
        [&](i64 i, T value) { values[i] = value; });
    return result;
  });
}

Tensor rows_backward(const Tensor& grad, const Tensor& pred, const Tensor& target, const Optional& index_tensor,
                     std::string loss, double beta, bool normalize_target, double eps) {
  const Index index(target, index_tensor);
  return with_type(pred, target, [&](auto zero) {
    using T = decltype(zero);
    Tensor dpred = empty(sizes(pred, pred.dim()), pred.scalar_type());
    const Tensor dense = torch::stable::contiguous(torch::stable::to(grad, kScalar<T>));
    const T* weights = data<T>(dense);
    visit<T>(
        pred, target, index, regression<T>(loss, beta, normalize_target, eps), [&](i64 i) { return weights[i]; },
        &dpred, [](i64, T) {});
    return dpred;
  });
}

// Layers are standardised a tile of columns at a time, so that all passes over a tile but the first find it in the
// cache, as do all layers the sum. A tile belongs to one thread.
template <typename T>
Tensor average(const std::vector<Tensor>& layers, bool instance_norm, bool layer_norm, T eps) {
  constexpr i64 kTileBytes = i64(256) << 10, kNarrowest = 64, kWidest = 1024;
  const i64 batch = layers[0].size(0), rows = layers[0].size(1), n = layers[0].size(2);
  Tensor result = empty({batch, rows, n}, kScalar<T>);
  T* out = data<T>(result);
  const i64 fitting = kTileBytes / (std::max<i64>(rows, 1) * i64(sizeof(T))) / 16 * 16;
  const i64 width = std::clamp(fitting, kNarrowest, kWidest), strips = (n + width - 1) / width;
  const double flops = kFlopsAnElement * batch * rows * n * layers.size();
  const T factor = T(1) / layers.size();
  const i64 threads = useful_threads(flops), tiles_in_all = batch * strips;
  run(threads, [&](i64 thread) {
    Buffer<double> scratch(5 * width);
    Buffer<T> converted(rows * width);
    for (i64 tile = tiles_in_all * thread / threads; tile < tiles_in_all * (thread + 1) / threads; ++tile) {
      const i64 b = tile / strips, first = tile % strips * width, cols = std::min(width, n - first);
      T* sum = out + b * rows * n + first;
      for (size_t k = 0; k < layers.size(); ++k) {
        const Tensor& x = layers[k];
        const char* at = static_cast<const char*>(x.const_data_ptr()) +
                         (b * x.stride(0) + first * x.stride(2)) * static_cast<i64>(x.element_size());
        const bool direct = x.scalar_type() == kScalar<T> && x.stride(2) == 1;
        if (!direct)
          tiles<T>().load(at, kind(x), x.stride(1), x.stride(2), converted, rows, cols, T(1));
        const T* source = direct ? reinterpret_cast<const T*>(at) : converted;
        const i64 ld = direct ? x.stride(1) : cols;
        if (instance_norm)
          SSLKERNELS_AT_LEVEL(add_standardized<T>(source, ld, rows, cols, eps, factor, scratch, k == 0, sum, n));
        else
          SSLKERNELS_AT_LEVEL(add_scaled<T>(source, ld, rows, cols, factor, k == 0, sum, n));
      }
    }
  });
  if (layer_norm) {
    over_rows(batch * rows, kFlopsAnElement * batch * rows * n, [&](Range mine) {
      for (i64 i = mine.begin; i < mine.end; ++i) SSLKERNELS_AT_LEVEL(layer_norm<T>(out + i * n, n, eps));
    });
  }
  return result;
}

Tensor average_layers(const std::vector<Tensor>& layers, bool instance_norm, bool layer_norm, double eps) {
  if (std::any_of(layers.begin(), layers.end(), is_double))
    return average<double>(layers, instance_norm, layer_norm, eps);
  return average<float>(layers, instance_norm, layer_norm, static_cast<float>(eps));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("masked_regression", TORCH_BOX(&masked_regression));
  library.impl("masked_regression_rows", TORCH_BOX(&rows_forward));
  library.impl("masked_regression_rows_backward", TORCH_BOX(&rows_backward));
  library.impl("average_layers", TORCH_BOX(&average_layers));
}

}  // namespace sslkernels
