// SPDX-License-Identifier: Apache-2.0
// Tokens taken by their places, and put back among mask tokens.
#include "cpu/patches.h"

#define SSLKERNELS_LEAVES "cpu/patches_tokens.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

constexpr i64 kBlock = 32;  // rows that are summed in the precision of the arithmetic before they are in double

// Rows (b, l) of (B, L, D), of any dtype and strides.
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : batch(x.size(0)),
        length(x.size(1)),
        dim(x.size(2)),
        bytes(static_cast<i64>(x.element_size())),
        dtype(kind(x)),
        data_(static_cast<char*>(x.mutable_data_ptr())),
        batch_stride_(x.stride(0)),
        row_stride_(x.stride(1)),
        stride_(x.stride(2)) {}

  char* at(i64 b, i64 l) const { return data_ + bytes * (b * batch_stride_ + l * row_stride_); }
  bool dense() const { return stride_ == 1 || dim == 1; }

  // row (b, l) as numbers of type T: where it lies if it can be read there, else in `scratch`
  template <typename T>
  const T* fetch(i64 b, i64 l, T* scratch) const {
    if (dense() && dtype == (std::is_same_v<T, double> ? Dtype::kDouble : Dtype::kFloat))
      return reinterpret_cast<const T*>(at(b, l));
    tiles<T>().load(at(b, l), dtype, 0, stride_, scratch, 1, dim, T(1));
    return scratch;
  }

  // the same bits, dense
  void copy(i64 b, i64 l, char* to) const {
    const char* from = at(b, l);
    if (dense())
      std::memcpy(to, from, dim * bytes);
    else
      for (i64 d = 0; d < dim; ++d) std::memcpy(to + d * bytes, from + d * stride_ * bytes, bytes);
  }

  template <typename T>
  void store(const T* row, i64 b, i64 l) const {
    tiles<T>().store(row, at(b, l), dtype, dim, 1, dim);
  }

  i64 batch, length, dim, bytes;
  Dtype dtype;

 private:
  char* data_;
  i64 batch_stride_, row_stride_, stride_;
};

Tensor gather_tokens(const Tensor& tokens, const Tensor& ids) {
  const Rows from(tokens);
  const Ids places(ids, from.length, false);
  Tensor out = empty({places.rows, places.count, from.dim}, tokens.scalar_type());
  const Rows to(out);
  const i64 rows = places.rows * places.count;
  over_rows(rows, kFlopsAnElement * rows * from.dim, [&](Range mine) {
    for (i64 i = mine.begin; i < mine.end; ++i) {
      const i64 b = i / places.count;
      from.copy(b, places[i], to.at(b, i % places.count));
    }
  });
  return out;
}

// Of each of rows * length places, the positions in ids that name it, in their order.
struct ByPlace {
  ByPlace(const Ids& ids, i64 length) : first(ids.rows * length + 1, 0), position(ids.rows * ids.count) {
    const auto place = [&](i64 i) { return i / ids.count * length + ids[i]; };
    const i64 count = ids.rows * ids.count;
    for (i64 i = 0; i < count; ++i) ++first[place(i) + 1];
    for (size_t j = 1; j < first.size(); ++j) first[j] += first[j - 1];
    std::vector<i64> next(first.begin(), first.end() - 1);
    for (i64 i = 0; i < count; ++i) position[next[place(i)]++] = i;
  }
  std::vector<i64> first, position;
};

template <typename T>
void sum_by_place(const Rows& grad, const ByPlace& lists, i64 count, const Rows& out) {
  const i64 rows = out.batch * out.length, dim = out.dim;
  over_rows(rows, kFlopsAnElement * (grad.batch * grad.length + rows) * dim, [&](Range mine) {
    Buffer<T> scratch(dim), sum(dim);
    Buffer<double> total(dim);
    std::fill_n(static_cast<T*>(sum), dim, T(0));
    for (i64 i = mine.begin; i < mine.end; ++i) {
      const i64 b = i / out.length, l = i % out.length, begin = lists.first[i], end = lists.first[i + 1];
      const auto row = [&](i64 at) { return grad.fetch<T>(b, lists.position[at] % count, scratch); };
      if (end - begin == 1 && grad.dtype == out.dtype) {
        grad.copy(b, lists.position[begin] % count, out.at(b, l));
      } else if (end == begin) {
        std::memset(out.at(b, l), 0, dim * out.bytes);
      } else {
        std::fill_n(static_cast<double*>(total), dim, 0.0);
        for (i64 at = begin; at < end; ++at) {
          SSLKERNELS_AT_LEVEL(add_rows<T>(sum, row(at), sum, dim));
          if ((at - begin) % kBlock == kBlock - 1 || at == end - 1)
            SSLKERNELS_AT_LEVEL(flush_row<T>(sum, total, dim));
        }
        tiles<double>().store(total, out.at(b, l), out.dtype, dim, 1, dim);
      }
    }
  });
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& ids, i64 length) {
  const Ids places(ids, length, false);
  const ByPlace lists(places, length);
  Tensor out = empty({grad.size(0), length, grad.size(2)}, grad.scalar_type());
  with_type(kind(grad) == Dtype::kDouble,
            [&](auto zero) { sum_by_place<decltype(zero)>(Rows(grad), lists, places.count, Rows(out)); });
  return out;
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

template <typename T>
void restore(const Rows& visible, const Ids& ids, const Tensor& mask_token, const Optional& position, i64 prefix,
             const Rows& out) {
  const i64 dim = out.dim, length = out.length - prefix, rows = out.batch * out.length;
  const std::vector<i64> inverse = ids.inverse(length);
  Buffer<T> token(dim);
  tiles<T>().load(mask_token.const_data_ptr(), kind(mask_token), 0, mask_token.stride(0), token, 1, dim, T(1));
  // positions as rows of one sample
  const std::optional<Rows> positions =
      position ? std::optional<Rows>(torch::stable::unsqueeze(*position, 0)) : std::nullopt;
  const bool direct = out.dtype == (std::is_same_v<T, double> ? Dtype::kDouble : Dtype::kFloat);
  over_rows(rows, kFlopsAnElement * rows * dim, [&](Range mine) {
    Buffer<T> scratch(dim), position_scratch(dim), sum(dim);
    for (i64 i = mine.begin; i < mine.end; ++i) {
      const i64 b = i / out.length, l = i % out.length;
      const i64 named = l < prefix ? -1 : inverse[b * length + l - prefix];
      const T* row = token;
      if (l < prefix)
        row = visible.fetch<T>(b, l, scratch);
      else if (named >= 0)
        row = visible.fetch<T>(b, prefix + named % ids.count, scratch);
      if (positions) {
        T* to = direct ? reinterpret_cast<T*>(out.at(b, l)) : static_cast<T*>(sum);
        SSLKERNELS_AT_LEVEL(add_rows<T>(row, positions->fetch<T>(0, l, position_scratch), to, dim));
        row = to;
      }
      if (!positions || !direct)
        out.store<T>(row, b, l);
    }
  });
}

Tensor restore_tokens(const Tensor& visible, const Tensor& ids_tensor, const Tensor& mask_token,
                      const Optional& position, i64 length, i64 prefix) {
  const Ids ids(ids_tensor, length, true);
  STD_TORCH_CHECK(visible.size(1) == prefix + ids.count, "visible must have a row for each prefix token and id");
  const ScalarType dtype = promoted({&visible, &mask_token, position ? &*position : nullptr});
  Tensor out = empty({visible.size(0), prefix + length, visible.size(2)}, dtype);
  with_type(dtype == ScalarType::Double,
            [&](auto zero) { restore<decltype(zero)>(Rows(visible), ids, mask_token, position, prefix, Rows(out)); });
  return out;
}

// One place at a time over all samples: its position's gradient stays in the first-level cache.
template <typename T>
void restore_backward(const Rows& grad, const Ids& ids, i64 prefix, const std::optional<Rows>& visible, T* mask_token,
                      T* position) {
  const i64 dim = grad.dim, length = grad.length - prefix;
  const std::vector<i64> inverse = ids.inverse(length);
  const i64 threads = useful_threads(kFlopsAnElement * grad.batch * grad.length * dim);
  std::vector<Buffer<double>> tokens(threads, Buffer<double>(0));
  run(threads, [&](i64 t) {
    Buffer<T> scratch(dim), sum(dim), masked(dim);
    Buffer<double> total(dim), token(dim);
    std::fill_n(static_cast<double*>(token), dim, 0.0);
    std::fill_n(static_cast<T*>(sum), dim, T(0));
    std::fill_n(static_cast<T*>(masked), dim, T(0));
    for (i64 l = grad.length * t / threads; l < grad.length * (t + 1) / threads; ++l) {
      std::fill_n(static_cast<double*>(total), dim, 0.0);
      for (i64 b = 0; b < grad.batch; ++b) {
        const i64 named = l < prefix ? -1 : inverse[b * length + l - prefix];
        const bool hidden = l >= prefix && named < 0;
        if (visible && !hidden)
          grad.copy(b, l, visible->at(b, l < prefix ? l : prefix + named % ids.count));
        const bool last = b % kBlock == kBlock - 1 || b == grad.batch - 1;
        if (position || (mask_token && hidden)) {
          const T* row = grad.fetch<T>(b, l, scratch);
          if (position)
            SSLKERNELS_AT_LEVEL(add_rows<T>(sum, row, sum, dim));
          if (mask_token && hidden)
            SSLKERNELS_AT_LEVEL(add_rows<T>(masked, row, masked, dim));
        }
        if (position && last)
          SSLKERNELS_AT_LEVEL(flush_row<T>(sum, total, dim));
        if (mask_token && last)
          SSLKERNELS_AT_LEVEL(flush_row<T>(masked, token, dim));
      }
      if (position)
        for (i64 d = 0; d < dim; ++d) position[l * dim + d] = static_cast<T>(total[d]);
    }
    tokens[t] = token;
  });
  if (mask_token) {
    for (i64 d = 0; d < dim; ++d) {
      double total = 0;
      for (const double* token : tokens) total += token[d];
      mask_token[d] = static_cast<T>(total);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_backward(const Tensor& grad, const Tensor& ids_tensor, i64 prefix,
                                                           std::vector<bool> output_mask) {
  const Rows rows(grad);
  const Ids ids(ids_tensor, rows.length - prefix, true);
  return with_type(rows.dtype == Dtype::kDouble, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<i64> none{0};
    const std::vector<i64> visible_shape{rows.batch, prefix + ids.count, rows.dim};
    Tensor visible = empty(output_mask[0] ? visible_shape : none, grad.scalar_type());
    Tensor token = empty(output_mask[1] ? std::vector<i64>{rows.dim} : none, kScalar<T>);
    Tensor position = empty(output_mask[2] ? std::vector<i64>{rows.length, rows.dim} : none, kScalar<T>);
    restore_backward<T>(rows, ids, prefix, output_mask[0] ? std::optional<Rows>(visible) : std::nullopt,
                        output_mask[1] ? data<T>(token) : nullptr, output_mask[2] ? data<T>(position) : nullptr);
    return std::make_tuple(visible, token, position);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  library.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
  library.impl("restore_tokens", TORCH_BOX(&restore_tokens));
  library.impl("restore_tokens_backward", TORCH_BOX(&restore_tokens_backward));
}

}  // namespace sslkernels
