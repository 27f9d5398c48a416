// SPDX-License-Identifier: Apache-2.0
// masked_patch_loss for CUDA: a warp reads a patch of the image, normalises it and compares it with its row of pred.
//
// The target stays in shared memory, where planes become pixels; image, pred and gradient are touched once. Bytes bound
// it: 256 images, 147 of 196 patches of 16 x 16 x 3, a bfloat16 image and a row of pred for each hidden patch are 58 MB
// each, the float32 gradient 116 MB: 77 us at 3 TB/s.
#include "cuda/patches_pixels.h"

namespace sslkernels::patches {
namespace {

constexpr int kInFlight = 4;

enum Normalize { kNothing, kPatch, kChannel };
enum Reduction { kRows, kMean, kSum };

struct Loss {
  int normalize;
  double eps;
  bool l1, channels_last;
  int64_t values;
  Divider per_sample;  // rows of pred
  int64_t rows;        // of pred
  bool by_place;       // pred has a row for each patch, else for each id
};

// Rows of pred, and where their gradients go.
struct Pred {
  const void* data;
  int64_t batch, row, column;
  bool vectors;  // rows of data and of grad are vectors
  void* grad;    // contiguous, null if not wanted
  bool narrow;   // grad is of the dtype of pred, not of the arithmetic
};

// What a row's gradient is multiplied by: a number for each id, or one for all.
struct Slope {
  const void* data;  // null: `factor` alone
  Dtype dtype;
  int64_t batch, column;
  double factor;
};

template <typename T>
__device__ inline T sum_of_warp(T x) {
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

// Values t[i * stride], i < n, less their mean, by their unbiased deviation, in place; eps under the root or beside it.
// What is summed are differences from the first value, so that a constant patch gives zeros and a faint one keeps its
// digits.
template <typename T>
__device__ void standardize(T* t, int64_t n, int64_t stride, T eps, bool eps_beside, int lane) {
  const T first = t[0];
  T sum = 0;
#pragma unroll 8
  for (int64_t i = lane; i < n; i += kWarp) sum += t[i * stride] - first;
  const T mean = sum_of_warp(sum) / static_cast<T>(n);
  sum = 0;
#pragma unroll 8
  for (int64_t i = lane; i < n; i += kWarp) {
    const T d = (t[i * stride] - first) - mean;
    sum += d * d;
  }
  const T variance = sum_of_warp(sum) / static_cast<T>(n - 1);
  const T factor = T(1) / (eps_beside ? std::sqrt(variance) + eps : std::sqrt(variance + eps));
#pragma unroll 8
  for (int64_t i = lane; i < n; i += kWarp) t[i * stride] = ((t[i * stride] - first) - mean) * factor;
}

template <int width, typename P, typename T>
__device__ inline void put(const Pred& pred, int64_t at, const T (&y)[width]) {
  if (pred.narrow)
    store<P>(pred.grad, at, y);
  else
    store<T>(pred.grad, at, y);
}

// Every element of a row's gradient is `value`.
template <int width, typename P, typename T>
__device__ void fill(const Pred& pred, int64_t row, int64_t values, T value, int lane) {
  T y[width];
#pragma unroll
  for (int w = 0; w < width; ++w) y[w] = value;
  for (int64_t i = lane * width; i < values; i += kWarp * width) put<width, P>(pred, row * values + i, y);
}

// This lane's share of the sum over a row of (pred - target)^2 or |pred - target|; the gradient is slope times the
// difference or its sign.
template <int width, typename P, typename T>
__device__ T compare(const Pred& pred, const P* from, const T* target, int64_t row, int64_t values, bool l1, T slope,
                     int lane) {
  T sum = 0;
  for (int64_t i0 = lane * width; i0 < values; i0 += kInFlight * kWarp * width) {
    Vector<P, width> x[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = i0 + i * kWarp * width;
      if (at < values)
        x[i] = *reinterpret_cast<const Vector<P, width>*>(from + at * pred.column);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = i0 + i * kWarp * width;
      if (at < values) {
        T y[width];
        load<T>(target, at, y);
#pragma unroll
        for (int w = 0; w < width; ++w) {
          const T d = number<T>(x[i].values[w]) - y[w];
          sum += l1 ? std::abs(d) : d * d;
          y[w] = !l1 ? slope * d : d > 0 ? slope : d < 0 ? -slope : T(0);
        }
        if (pred.grad)
          put<width, P>(pred, row * values + at, y);
      }
    }
  }
  return sum;
}

template <typename T, typename P>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    loss_kernel(Source source, Places places, Ids ids, Inverse inverse, Loss loss, Pred pred, Slope slope, Slots slots,
                char* scratch, T* __restrict__ sums) {
  constexpr int width = kVector<P>;
  char* const shared = dynamic_shared<char>();
  T* const table = reinterpret_cast<T*>(shared);
  source.pixels.prepare(table);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * slots.warps + warp;
  if (row >= loss.rows)
    return;
  const int64_t b = loss.per_sample.quotient(static_cast<uint32_t>(row)), r = row - b * loss.per_sample.divisor;
  const int64_t k = loss.by_place ? inverse.at(b, r) : r, id = loss.by_place ? r : ids.at(b, r);
  const bool bad = loss.by_place ? k == kSeveral : inverse.is_bad(b, id);
  if (bad || k == kNone) {
    if (pred.grad) {
      const T value = bad ? static_cast<T>(NAN) : T(0);
      if (pred.vectors)
        fill<width, P>(pred, row, loss.values, value, lane);
      else
        fill<1, P>(pred, row, loss.values, value, lane);
    }
    if (lane == 0 && sums && !loss.by_place)
      sums[row] = static_cast<T>(NAN);
    return;
  }
  T* const target = slots.of<T>(scratch, shared, row, warp);
  read_patch(source, places.at(b, static_cast<uint32_t>(id)), table, target, lane);
  const T eps = static_cast<T>(loss.eps);
  if (loss.normalize != kNothing) {
    const bool beside = loss.normalize == kChannel;
    const int64_t groups = beside ? source.pixels.channels : 1, count = loss.values / groups;
    const bool mixed = beside && loss.channels_last;  // a channel's values are not adjacent
    for (int64_t g = 0; g < groups; ++g)
      standardize(target + (mixed ? g : g * count), count, mixed ? groups : 1, eps, beside, lane);
  }
  __syncwarp();
  T factor = static_cast<T>(slope.factor);
  if (slope.data) {
    T given[1];
    load(slope.data, slope.dtype, b * slope.batch + k * slope.column, given);
    factor *= given[0];
  }
  const P* const from = static_cast<const P*>(pred.data) + b * pred.batch + r * pred.row;
  const T sum = sum_of_warp(pred.vectors ? compare<width>(pred, from, target, row, loss.values, loss.l1, factor, lane)
                                         : compare<1>(pred, from, target, row, loss.values, loss.l1, factor, lane));
  if (lane == 0 && sums)
    sums[b * ids.per_sample + k] = sum / static_cast<T>(loss.values);
}

// Where pred has a row for each patch, no warp comes to a bad id.
template <typename T>
__global__ void __launch_bounds__(kThreads) spoil_kernel(Ids ids, Inverse inverse, Divider per_sample, T* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= ids.rows * ids.per_sample)
    return;
  const int64_t b = per_sample.quotient(static_cast<uint32_t>(i));
  if (inverse.is_bad(b, ids.at(b, i - b * per_sample.divisor)))
    sums[i] = static_cast<T>(NAN);
}

constexpr int kTotalThreads = 1024;

template <typename T>
__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const T* __restrict__ sums, int64_t count, double weight, T* __restrict__ loss) {
  double total = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kTotalThreads) total += static_cast<double>(sums[i]);
  __shared__ double parts[kTotalThreads / kWarp];
  total = sum_of_warp(total);
  if (threadIdx.x % kWarp == 0)
    parts[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    total = sum_of_warp(parts[threadIdx.x]);
    if (threadIdx.x == 0)
      *loss = static_cast<T>(total * weight);
  }
}

template <typename T>
struct Sweep {
  const Grid& grid;
  const Ids& ids;
  const Inverse& inverse;
  const Source& source;
  const Device& device;

  // sums: mean of each row that ids name, if wanted; grad: of pred, if wanted
  void operator()(const Tensor& pred, Loss loss, const Slope& slope, T* sums, const Tensor* grad) const {
    STD_TORCH_CHECK(pred.size(1) == ids.per_sample || pred.size(1) == grid.length,
                    "pred must have a row for each id or patch");
    STD_TORCH_CHECK(pred.size(0) == grid.batch && pred.size(2) == grid.values,
                    "pred must have the values of a patch in each row");
    loss.values = grid.values;
    loss.per_sample = Divider(pred.size(1));
    loss.rows = pred.size(0) * pred.size(1);
    loss.by_place = pred.size(1) != ids.per_sample;
    const Slots slots(grid.values, sizeof(T), source.pixels.table_bytes(sizeof(T) == 8));
    const Tensor scratch = empty_like(pred, {slots.in_global ? loss.rows * slots.bytes : 0}, ScalarType::Byte);
    with_float(kind(pred.scalar_type()), [&](auto tag) {
      using P = typename decltype(tag)::type;
      if constexpr (std::is_same_v<T, double> || !std::is_same_v<P, double>) {
        const Pred rows{pred.const_data_ptr(),
                        pred.stride(0),
                        pred.stride(1),
                        pred.stride(2),
                        grid.values % kVector<P> == 0 && pred.stride(2) == 1 &&
                            aligned(pred.const_data_ptr(), 16, sizeof(P), {pred.stride(0), pred.stride(1)}),
                        grad ? grad->mutable_data_ptr() : nullptr,
                        grad && grad->scalar_type() == pred.scalar_type()};
        device.launch(&loss_kernel<T, P>, blocks_of(loss.rows, slots.warps), slots.warps * kWarp, slots.shared, source,
                      grid.places, ids, inverse, loss, rows, slope, slots,
                      static_cast<char*>(scratch.mutable_data_ptr()), sums);
      }
    });
    if (sums && loss.by_place)
      device.launch(&spoil_kernel<T>, blocks_of(ids.rows * ids.per_sample, kThreads), kThreads, 0, ids, inverse,
                    Divider(ids.per_sample), sums);
  }
};

// f(zero of the type to compute in, Sweep)
template <typename F>
auto with_sweep(const Tensor& pred, const Tensor& images, const Tensor& ids_tensor, const std::vector<int64_t>& patch,
                bool channels_last, const Optional& mean_std, const F& f) {
  const Grid grid = grid_of(images, patch);
  const Ids ids(ids_tensor, images, grid.batch, grid.length);
  check_device("pred", pred, images);
  const Device device(images);
  const Inverted inverted = invert(ids, images, device);
  const bool wide = pred.scalar_type() == ScalarType::Double || images.scalar_type() == ScalarType::Double;
  const Pixels pixels(images, mean_std, grid, channels_last, wide);
  const Source source = source_of(images, grid, pixels, wide);
  return wide ? f(0.0, Sweep<double>{grid, ids, inverted.inverse, source, device})
              : f(0.0f, Sweep<float>{grid, ids, inverted.inverse, source, device});
}

std::tuple<Tensor, Tensor> masked_patch_loss(const Tensor& pred, const Tensor& images, const Tensor& ids,
                                             std::vector<int64_t> patch, int64_t normalize, double eps, bool l1,
                                             bool channels_last, const Optional& mean_std, int64_t reduction,
                                             bool want_grad) {
  return with_sweep(pred, images, ids, patch, channels_last, mean_std, [&](auto zero, const auto& sweep) {
    using T = decltype(zero);
    const int64_t rows = ids.size(0) * ids.size(1);
    const bool whole = reduction != kRows, emit = whole && want_grad;
    const double weight = reduction == kMean ? 1.0 / static_cast<double>(rows) : 1.0;
    const Loss options{static_cast<int>(normalize), eps, l1, channels_last, 0, Divider(), 0, false};
    const Slope slope{nullptr, Dtype::float32, 0, 0, (l1 ? 1 : 2) * weight / static_cast<double>(pred.size(2))};
    const Tensor sums = empty_like(pred, {ids.size(0), ids.size(1)}, kScalar<T>);
    const Tensor grad = empty_like(
        pred, emit ? std::vector<int64_t>{pred.size(0), pred.size(1), pred.size(2)} : std::vector<int64_t>{0},
        kScalar<T>);
    sweep(pred, options, slope, static_cast<T*>(sums.mutable_data_ptr()), emit ? &grad : nullptr);
    if (!whole)
      return std::make_tuple(sums, grad);
    const Tensor loss = empty_like(pred, {}, kScalar<T>);
    sweep.device.launch(&total_kernel<T>, 1, kTotalThreads, 0, static_cast<const T*>(sums.const_data_ptr()), rows,
                        weight, static_cast<T*>(loss.mutable_data_ptr()));
    return std::make_tuple(loss, grad);
  });
}

Tensor masked_patch_loss_backward(const Tensor& grad, const Tensor& pred, const Tensor& images, const Tensor& ids,
                                  std::vector<int64_t> patch, int64_t normalize, double eps, bool l1,
                                  bool channels_last, const Optional& mean_std) {
  return with_sweep(pred, images, ids, patch, channels_last, mean_std, [&](auto zero, const auto& sweep) {
    constexpr bool wide = std::is_same_v<decltype(zero), double>;
    STD_TORCH_CHECK(wide || grad.scalar_type() != ScalarType::Double,
                    "grad must not be wider than what the loss is computed in");
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == ids.size(0) && grad.size(1) == ids.size(1),
                    "grad must have a number for each id");
    check_device("grad", grad, pred);
    const Loss options{static_cast<int>(normalize), eps, l1, channels_last, 0, Divider(), 0, false};
    const Slope slope{grad.const_data_ptr(), kind(grad.scalar_type()), grad.stride(0), grad.stride(1),
                      (l1 ? 1.0 : 2.0) / static_cast<double>(pred.size(2))};
    const Tensor out = empty_like(pred, {pred.size(0), pred.size(1), pred.size(2)}, pred.scalar_type());
    sweep(pred, options, slope, nullptr, &out);
    return out;
  });
}

}  // namespace
}  // namespace sslkernels::patches

SSLKERNELS_CUDA_OPS(library) {
  library.impl("masked_patch_loss", TORCH_BOX(&sslkernels::patches::masked_patch_loss));
  library.impl("masked_patch_loss_backward", TORCH_BOX(&sslkernels::patches::masked_patch_loss_backward));
}
