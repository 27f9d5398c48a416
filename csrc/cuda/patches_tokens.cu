// SPDX-License-Identifier: Apache-2.0
// gather_tokens and restore_tokens for CUDA, and the gradients of restore_tokens.
//
// Rows are copied by threads that own 16 bytes each, of whatever row they fall into. The sums of the backward of
// restore_tokens are over the batch: a block owns one place and some columns of it, its warps take samples in turn, in
// float for 32 of them and then in double, and they meet in a fixed order. What counts is bytes: 256 samples of 197
// tokens of width 512 in bfloat16 are 52 MB, 17 us at 3 TB/s.
#include "cuda/patches.h"

namespace sslkernels::patches {
namespace {

constexpr int kInFlight = 4;
constexpr int kWarps = kThreads / kWarp;

// Rows (b, l) of (B, L, D), of any floating dtype and strides.
struct Rows {
  explicit Rows(const Tensor& x, const char* name, const Tensor& like)
      : data(x.const_data_ptr()),
        dtype(kind(x.scalar_type())),
        batch(x.stride(0)),
        row(x.stride(1)),
        column(x.stride(2)),
        bytes(bytes_of(dtype)) {
    check_device(name, x, like);
  }

  // Whether `width` columns are one aligned vector wherever they start.
  bool fits(int width) const {
    return width == 1 || (column == 1 && aligned(data, width * bytes, bytes, {batch, row}));
  }

  template <int width, typename T>
  __device__ void fetch(int64_t b, int64_t l, int64_t d, T (&y)[width]) const {
    load(data, dtype, b * batch + l * row + d * column, y);
  }

  const void* data;
  Dtype dtype;
  int64_t batch, row, column, bytes;
};

// The units of a contiguous (rows, units) tensor that a thread of this block has, `kInFlight` of them.
struct Span {
  Span(int64_t rows_, int64_t units_) : rows(rows_), units(units_) {
    STD_TORCH_CHECK(rows_ < int64_t{1} << 31 && units_ < int64_t{1} << 30, "more rows than a kernel can count");
  }

  unsigned blocks() const { return blocks_of(rows * units.divisor, kThreads * kInFlight); }

  // row and unit of this thread's i-th; false past the end
  __device__ bool at(int i, int64_t* row, uint32_t* unit) const {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kInFlight);
    const int64_t before = first / units.divisor;
    const uint32_t n = static_cast<uint32_t>(first - before * units.divisor) + i * kThreads + threadIdx.x;
    const uint32_t q = units.quotient(n);
    *row = before + q;
    *unit = n - q * units.divisor;
    return *row < rows;
  }

  int64_t rows;
  Divider units;
};

// out[b, k] = tokens[b, prefix + ids[b, k - prefix]], or tokens[b, k] where k < prefix.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    take_kernel(Span span, Rows tokens, Ids ids, Divider per_sample, int prefix, Word* __restrict__ out, Word nothing) {
  constexpr int64_t size = sizeof(Word);
  const auto* data = static_cast<const char*>(tokens.data);
  Word x[kInFlight];
  int64_t row, from[kInFlight];
  uint32_t unit;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    from[i] = -1;
    if (span.at(i, &row, &unit)) {
      const uint32_t b = per_sample.quotient(static_cast<uint32_t>(row));
      const int64_t k = row - int64_t{b} * per_sample.divisor, id = k < prefix ? k - prefix : ids.at(b, k - prefix);
      if (k < prefix || ids.has(id))
        from[i] = tokens.bytes * (b * tokens.batch + (prefix + id) * tokens.row) +
                  int64_t{unit} * (tokens.column == 1 ? size : tokens.column * size);
    }
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) x[i] = from[i] < 0 ? nothing : *reinterpret_cast<const Word*>(data + from[i]);
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (span.at(i, &row, &unit))
      out[row * span.units.divisor + unit] = x[i];
  }
}

// Bad ids take NaN, or zeros.
Tensor take(const Tensor& tokens, const Ids& ids, int64_t prefix, bool zeros, const Device& device) {
  const int64_t count = prefix + ids.per_sample, dim = tokens.size(2);
  const Tensor out = empty_like(tokens, {ids.rows, count, dim}, tokens.scalar_type());
  const Rows rows(tokens, "tokens", tokens);
  const int64_t width = 16 / rows.bytes;
  const bool vectors = dim % width == 0 && rows.fits(static_cast<int>(width));
  with_word(rows.dtype, vectors, [&](auto nothing) {
    using Word = decltype(nothing);
    const Span span(ids.rows * count, vectors ? dim / width : dim);
    device.launch(&take_kernel<Word>, dim ? span.blocks() : 0, kThreads, 0, span, rows, ids, Divider(count),
                  static_cast<int>(prefix), static_cast<Word*>(out.mutable_data_ptr()), zeros ? Word{} : nothing);
  });
  return out;
}

Tensor gather_tokens(const Tensor& tokens, const Tensor& ids_tensor) {
  const Ids ids(ids_tensor, tokens, tokens.size(0), tokens.size(1));
  return take(tokens, ids, 0, false, Device(tokens));
}

template <int n>
using Width = std::integral_constant<int, n>;

struct Restored {
  Rows visible, mask_token, position;
  bool has_position;
  int64_t prefix;
};

template <typename S, typename T, int width>
__global__ void __launch_bounds__(kThreads, width == 8 ? 2 : 4)
    restore_kernel(Span span, Restored in, Inverse inverse, Divider length, void* __restrict__ out, Dtype dtype) {
  const auto* visible = static_cast<const S*>(in.visible.data);
  int64_t row, from[kInFlight];
  uint32_t unit;
  constexpr int64_t kToken = -1, kSpoiled = -2;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    from[i] = kSpoiled;
    if (span.at(i, &row, &unit)) {
      const uint32_t b = length.quotient(static_cast<uint32_t>(row));
      const int64_t l = row - int64_t{b} * length.divisor;
      const int64_t k = l < in.prefix ? l - in.prefix : inverse.at(b, l - in.prefix);
      const int64_t at = b * in.visible.batch + (in.prefix + k) * in.visible.row + unit * width * in.visible.column;
      from[i] = inverse.spoiled[b] ? kSpoiled : l < in.prefix || k >= 0 ? at : kToken;
    }
  }
  Vector<S, width> x[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (from[i] >= 0)
      x[i] = *reinterpret_cast<const Vector<S, width>*>(visible + from[i]);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (span.at(i, &row, &unit)) {
      const uint32_t l = static_cast<uint32_t>(row) - length.quotient(static_cast<uint32_t>(row)) * length.divisor;
      const int64_t d = int64_t{unit} * width;
      T y[width], p[width];
      if (from[i] == kToken) {
        in.mask_token.fetch(0, 0, d, y);
      } else {
#pragma unroll
        for (int w = 0; w < width; ++w) y[w] = from[i] == kSpoiled ? static_cast<T>(NAN) : number<T>(x[i].values[w]);
      }
      if (in.has_position) {
        in.position.fetch(0, l, d, p);
#pragma unroll
        for (int w = 0; w < width; ++w) y[w] += p[w];
      }
      store(out, dtype, (row * span.units.divisor + unit) * width, y);
    }
  }
}

// The widest of the floating dtypes that `xs` have; float32 for float16 beside bfloat16.
ScalarType promoted(std::initializer_list<const Tensor*> xs) {
  ScalarType widest = (*xs.begin())->scalar_type();
  for (const Tensor* x : xs) {
    if (x == nullptr || x->scalar_type() == widest)
      continue;
    const bool any_double = widest == ScalarType::Double || x->scalar_type() == ScalarType::Double;
    widest = any_double ? ScalarType::Double : ScalarType::Float;
  }
  return widest;
}

Tensor restore_tokens(const Tensor& visible, const Tensor& ids_tensor, const Tensor& mask_token,
                      const Optional& position, int64_t length, int64_t prefix) {
  const int64_t batch = visible.size(0), dim = visible.size(2);
  const Ids ids(ids_tensor, visible, batch, length);
  STD_TORCH_CHECK(visible.size(1) == prefix + ids.per_sample, "visible must have a row for each prefix token and id");
  STD_TORCH_CHECK(mask_token.numel() == dim && mask_token.dim() == 1, "mask_token must be (D)");
  STD_TORCH_CHECK(!position || (position->size(0) == prefix + length && position->size(1) == dim),
                  "position must be (P + L, D)");
  const ScalarType type = promoted({&visible, &mask_token, position ? &*position : nullptr});
  const Tensor out = empty_like(visible, {batch, prefix + length, dim}, type);
  const Device device(visible);
  const Inverted inverted = invert(ids, visible, device);
  const Tensor token = torch::stable::view(torch::stable::contiguous(mask_token), {1, 1, dim});
  const Rows rows(visible, "visible", visible);
  const Restored in{rows, Rows(token, "mask_token", visible),
                    position ? Rows(torch::stable::unsqueeze(*position, 0), "position", visible) : rows,
                    position.has_value(), prefix};
  const auto launch = [&](auto source, auto zero, auto size) {
    using S = typename decltype(source)::type;
    using T = decltype(zero);
    constexpr int width = decltype(size)::value;
    if (dim % width || !rows.fits(width) || !in.mask_token.fits(width) || !in.position.fits(width))
      return false;
    const Span span(batch * (prefix + length), dim / width);
    device.launch(&restore_kernel<S, T, width>, dim ? span.blocks() : 0, kThreads, 0, span, in, inverted.inverse,
                  Divider(prefix + length), out.mutable_data_ptr(), kind(type));
    return true;
  };
  with_float(rows.dtype, [&](auto source) {
    using S = typename decltype(source)::type;
    if (type == ScalarType::Double) {
      launch(source, 0.0, Width<std::is_same_v<S, double> ? 2 : 1>{}) || launch(source, 0.0, Width<1>{});
    } else if constexpr (!std::is_same_v<S, double>) {
      (type != ScalarType::Float && launch(source, 0.0f, Width<kNarrow<S> ? 8 : 4>{})) ||
          launch(source, 0.0f, Width<4>{}) || launch(source, 0.0f, Width<1>{});
    }
  });
  return out;
}

// Sums over the batch at one place: of all rows, and of those of the mask token.
template <typename G, int width>
__global__ void __launch_bounds__(kThreads)
    sum_places_kernel(Rows grad, Inverse inverse, int64_t batch, int64_t prefix, int64_t dim, uint32_t parts_of_row,
                      Wide<G>* __restrict__ position, double* __restrict__ masked) {
  using T = Wide<G>;
  const int64_t l = blockIdx.x / parts_of_row, first = int64_t{blockIdx.x % parts_of_row} * kWarp * width;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t d = first + lane * width;
  const auto* data = static_cast<const G*>(grad.data) + l * grad.row + d * grad.column;
  double totals[2][width] = {};
  if (d < dim) {
    int64_t seen = 0;
    T sums[2][width] = {};
    for (int64_t b0 = warp; b0 < batch; b0 += kInFlight * kWarps) {
      Vector<G, width> x[kInFlight];
      bool hidden[kInFlight], read[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t b = b0 + i * kWarps;
        hidden[i] = masked && b < batch && l >= prefix && inverse.at(b, l - prefix) == kNone;
        read[i] = b < batch && (hidden[i] || position);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (read[i])
          x[i] = *reinterpret_cast<const Vector<G, width>*>(data + (b0 + i * kWarps) * grad.batch);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (read[i]) {
#pragma unroll
          for (int w = 0; w < width; ++w) {
            const T value = number<T>(x[i].values[w]);
            sums[0][w] += value;
            sums[1][w] += hidden[i] ? value : T(0);
          }
        }
      }
      seen += kInFlight;
      if (seen % kWarp == 0 || b0 + kInFlight * kWarps >= batch) {
#pragma unroll
        for (int w = 0; w < width; ++w) {
          totals[0][w] += static_cast<double>(sums[0][w]);
          totals[1][w] += static_cast<double>(sums[1][w]);
          sums[0][w] = sums[1][w] = T(0);
        }
      }
    }
  }
  __shared__ double parts[kWarps][kWarp * width];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    if (which == 0 ? position == nullptr : masked == nullptr)
      continue;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < width; ++w) parts[warp][lane * width + w] = totals[which][w];
    __syncthreads();
    for (int c = threadIdx.x; c < kWarp * width; c += kThreads) {
      const int64_t column = first + c;
      if (column < dim) {
        double total = 0;
        for (int i = 0; i < kWarps; ++i) total += parts[i][c];
        if (which == 0)
          position[l * dim + column] = static_cast<T>(total);
        else
          masked[l * dim + column] = total;
      }
    }
  }
}

// The columns of (rows, dim) summed, 32 of them by a block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_columns_kernel(const double* __restrict__ x, int64_t rows, int64_t dim, T* __restrict__ out) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double total = 0;
  if (d < dim) {
#pragma unroll 4
    for (int64_t row = warp; row < rows; row += kWarps) total += x[row * dim + d];
  }
  __shared__ double parts[kWarps][kWarp];
  parts[warp][lane] = total;
  __syncthreads();
  if (warp == 0 && d < dim) {
    for (int i = 1; i < kWarps; ++i) total += parts[i][lane];
    out[d] = static_cast<T>(total);
  }
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_backward(const Tensor& grad, const Tensor& ids_tensor, int64_t prefix,
                                                           std::vector<bool> output_mask) {
  const int64_t batch = grad.size(0), length = grad.size(1), dim = grad.size(2);
  const Ids ids(ids_tensor, grad, batch, length - prefix);
  const Device device(grad);
  const Rows rows(grad, "grad", grad);
  const ScalarType wide = rows.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  const auto none = std::vector<int64_t>{0};
  const Tensor visible =
      output_mask[0] ? take(grad, ids, prefix, true, device) : empty_like(grad, none, grad.scalar_type());
  const Tensor token = empty_like(grad, output_mask[1] ? std::vector<int64_t>{dim} : none, wide);
  const Tensor position = empty_like(grad, output_mask[2] ? std::vector<int64_t>{length, dim} : none, wide);
  if (!output_mask[1] && !output_mask[2])
    return {visible, token, position};
  const Inverted inverted = invert(ids, grad, device);
  const Tensor masked = empty_like(grad, output_mask[1] ? std::vector<int64_t>{length, dim} : none, ScalarType::Double);
  auto* parts = output_mask[1] ? static_cast<double*>(masked.mutable_data_ptr()) : nullptr;
  with_float(rows.dtype, [&](auto tag) {
    using G = typename decltype(tag)::type;
    using T = Wide<G>;
    constexpr int width = kVector<G>;
    auto* sums = output_mask[2] ? static_cast<T*>(position.mutable_data_ptr()) : nullptr;
    const auto launch = [&](auto size) {
      constexpr int n = decltype(size)::value;
      const unsigned parts_of_row = blocks_of(dim, kWarp * n);
      device.launch(&sum_places_kernel<G, n>, blocks_of(length * parts_of_row, 1), kThreads, 0, rows, inverted.inverse,
                    batch, prefix, dim, parts_of_row, sums, parts);
    };
    if (dim % width == 0 && rows.fits(width))
      launch(Width<width>{});
    else
      launch(Width<1>{});
    if (output_mask[1])
      device.launch(&sum_columns_kernel<T>, blocks_of(dim, kWarp), kThreads, 0, parts, length, dim,
                    static_cast<T*>(token.mutable_data_ptr()));
  });
  return {visible, token, position};
}

}  // namespace
}  // namespace sslkernels::patches

SSLKERNELS_CUDA_OPS(library) {
  library.impl("gather_tokens", TORCH_BOX(&sslkernels::patches::gather_tokens));
  library.impl("restore_tokens", TORCH_BOX(&sslkernels::patches::restore_tokens));
  library.impl("restore_tokens_backward", TORCH_BOX(&sslkernels::patches::restore_tokens_backward));
}
