// SPDX-License-Identifier: Apache-2.0
// masked_patch_loss: targets are read from the image and normalised patch by patch, and never stored.
#include "cpu/patches.h"

#define SSLKERNELS_LEAVES "cpu/patches_loss.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

enum Normalize { kNothing, kPatch, kChannel };
enum Reduction { kNone, kMean, kSum };

struct Options {
  i64 normalize;
  double eps;
  bool l1, channels_last;
};

// Sizes and strides of values that lie dense in the order (c, t, p, q).
PatchShape dense_planes(PatchShape s) {
  s.q_stride = 1;
  s.p_stride = s.q;
  s.t_stride = s.p * s.q;
  s.channel_stride = s.t * s.p * s.q;
  return s;
}

// The target of one patch, in the order of pred; `planes` is scratch for targets normalised by channel.
template <typename T>
void read_target(const char* src, const PatchShape& shape, const Pixels<T>& pixels, const Options& options, T* planes,
                 T* target) {
  const T eps = static_cast<T>(options.eps);
  if (options.normalize != kChannel) {
    pixels.read(src, shape, options.channels_last, target);
    if (options.normalize == kPatch)
      SSLKERNELS_AT_LEVEL(standardize_values(target, shape.values(), eps, false));
    return;
  }
  T* by_channel = options.channels_last ? planes : target;
  const PatchShape dense = dense_planes(shape);
  pixels.read(src, shape, false, by_channel);
  for (i64 c = 0; c < dense.channels; ++c) {
    T* channel = by_channel + c * dense.channel_stride;
    SSLKERNELS_AT_LEVEL(standardize_values(channel, dense.channel_stride, eps, true));
  }
  if (options.channels_last)
    Pixels<T>().read(planes, dense, true, target);
}

// Sums over the rows of pred that ids name, and their gradients: `slope` is a number for each id, or one for all.
template <typename T>
void sweep(const Tensor& pred, const Grid& grid, const Ids& ids, const Pixels<T>& pixels, const Options& options,
           const T* slope, bool one_slope, T* sums, const Tensor* grad) {
  const i64 per_sample = pred.size(1), rows = grid.batch * per_sample, values = grid.shape.values();
  const bool aligned = per_sample == ids.count;
  const std::vector<i64> inverse = aligned ? std::vector<i64>() : ids.inverse(per_sample);
  const i64 bytes = static_cast<i64>(pred.element_size());
  const bool pred_direct = pred.scalar_type() == kScalar<T> && pred.stride(2) == 1;
  const bool grad_same = grad && grad->scalar_type() == kScalar<T>;
  const bool past_caches = grad_same && rows * values * static_cast<i64>(sizeof(T)) >= kStreamBytes;
  const bool grad_direct = grad_same && !past_caches;
  const i64 grad_bytes = grad ? static_cast<i64>(grad->element_size()) : 0;
  const char* preds = static_cast<const char*>(pred.const_data_ptr());
  char* grads = grad ? static_cast<char*>(grad->mutable_data_ptr()) : nullptr;
  // the position in ids of row i, -1 for a row that none names
  const auto position = [&](i64 i) { return aligned ? i : inverse[i]; };
  const auto place = [&](i64 at) { return grid.at(at / ids.count, ids[at]); };
  over_rows(rows, kFlopsAnElement * ids.rows * ids.count * values, [&](Range mine) {
    Buffer<T> planes(values), target(values), pred_row(pred_direct ? 0 : values), grad_row(grad_direct ? 0 : values);
    Buffer<T> zeros(past_caches ? values : 0);
    std::fill_n(static_cast<T*>(zeros), past_caches ? values : 0, T(0));
    for (i64 i = mine.begin; i < mine.end; ++i) {
      const i64 at = position(i);
      char* out = grad ? grads + i * values * grad_bytes : nullptr;
      if (at < 0) {
        if (past_caches)
          stream(zeros, out, values * grad_bytes);
        else if (grad)
          std::memset(out, 0, values * grad_bytes);
        continue;
      }
      read_target<T>(place(at), grid.shape, pixels, options, planes, target);
      const char* src = preds + bytes * (i / per_sample * pred.stride(0) + i % per_sample * pred.stride(1));
      if (!pred_direct)
        tiles<T>().load(src, kind(pred), 0, pred.stride(2), pred_row, 1, values, T(1));
      const T* from = pred_direct ? reinterpret_cast<const T*>(src) : static_cast<const T*>(pred_row);
      T* to = !grad ? nullptr : grad_direct ? reinterpret_cast<T*>(out) : static_cast<T*>(grad_row);
      const T s = slope[one_slope ? 0 : at];
      const T sum = SSLKERNELS_AT_LEVEL(compare_values<T>(from, target, values, options.l1, s, to));
      if (sums)
        sums[at] = sum / static_cast<T>(values);
      if (past_caches)
        stream(to, out, values * grad_bytes);
      else if (grad && !grad_direct)
        tiles<T>().store(to, out, kind(*grad), values, 1, values);
    }
    finish_streams();
  });
}

Options checked(const Tensor& pred, const Grid& grid, const Ids& ids, i64 normalize, double eps, bool l1, bool last) {
  STD_TORCH_CHECK(pred.size(1) == ids.count || pred.size(1) == grid.length,
                  "pred must have a row for each id or patch");
  STD_TORCH_CHECK(pred.size(2) == grid.shape.values(), "pred must have the values of a patch in each row");
  return {normalize, eps, l1, last};
}

std::tuple<Tensor, Tensor> masked_patch_loss(const Tensor& pred, const Tensor& images, const Tensor& ids_tensor,
                                             std::vector<i64> patch, i64 normalize, double eps, bool l1,
                                             bool channels_last, const Optional& mean_std, i64 reduction,
                                             bool want_grad) {
  const Grid grid(images, patch);
  const Ids ids(ids_tensor, grid.length, true);
  const Options options = checked(pred, grid, ids, normalize, eps, l1, channels_last);
  return with_type(pred, images, [&](auto zero) {
    using T = decltype(zero);
    const i64 rows = ids.rows * ids.count;
    const bool whole = reduction != kNone, emit = whole && want_grad;
    const double weight = reduction == kMean ? 1.0 / static_cast<double>(rows) : 1.0;
    const T slope = static_cast<T>((l1 ? 1 : 2) * weight / static_cast<double>(grid.shape.values()));
    Tensor sums = empty({ids.rows, ids.count}, kScalar<T>);
    Tensor grad = emit ? empty({pred.size(0), pred.size(1), pred.size(2)}, kScalar<T>) : empty({0}, kScalar<T>);
    sweep<T>(pred, grid, ids, Pixels<T>(grid, mean_std), options, &slope, true, data<T>(sums), emit ? &grad : nullptr);
    if (!whole)
      return std::make_tuple(sums, grad);
    double total = 0;
    for (i64 i = 0; i < rows; ++i) total += data<T>(sums)[i];
    Tensor loss = empty({}, kScalar<T>);
    *data<T>(loss) = static_cast<T>(total * weight);
    return std::make_tuple(loss, grad);
  });
}

Tensor masked_patch_loss_backward(const Tensor& grad, const Tensor& pred, const Tensor& images,
                                  const Tensor& ids_tensor, std::vector<i64> patch, i64 normalize, double eps, bool l1,
                                  bool channels_last, const Optional& mean_std) {
  const Grid grid(images, patch);
  const Ids ids(ids_tensor, grid.length, true);
  const Options options = checked(pred, grid, ids, normalize, eps, l1, channels_last);
  return with_type(pred, images, [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> slope(ids.rows * ids.count);
    const T factor = static_cast<T>((l1 ? 1.0 : 2.0) / static_cast<double>(grid.shape.values()));
    tiles<T>().load(grad.const_data_ptr(), kind(grad), grad.stride(0), grad.stride(1), slope, ids.rows, ids.count,
                    factor);
    const Tensor out = empty({pred.size(0), pred.size(1), pred.size(2)}, pred.scalar_type());
    sweep<T>(pred, grid, ids, Pixels<T>(grid, mean_std), options, slope, false, nullptr, &out);
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("masked_patch_loss", TORCH_BOX(&masked_patch_loss));
  library.impl("masked_patch_loss_backward", TORCH_BOX(&masked_patch_loss_backward));
}

}  // namespace sslkernels
