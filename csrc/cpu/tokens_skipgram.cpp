// SPDX-License-Identifier: Apache-2.0
// skipgram for the CPU: each pair's scores straight from both tables, and gradients whose rows belong to threads.
#include <string>
#include <tuple>
#include <vector>

#include "cpu/operand.h"

namespace sslkernels {

namespace {

const i64* ids(const Tensor& x, i64 rows, const char* name) {
  const i64* values = data<i64>(x);
  for (i64 i = 0; i < x.numel(); ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < rows, "skipgram: ", name, " must be in [0, ", rows, "), got ",
                    values[i]);
  return values;
}

// Every id checked before anything is written.
struct Pairs {
  Pairs(const Tensor& input, const Tensor& output, const Tensor& inputs_, const Tensor& outputs_,
        const Tensor& negatives_)
      : inputs_tensor(torch::stable::contiguous(inputs_)),
        outputs_tensor(torch::stable::contiguous(outputs_)),
        negatives_tensor(torch::stable::contiguous(negatives_)),
        count(inputs_.size(0)),
        draws(negatives_.size(1)),
        inputs(ids(inputs_tensor, input.size(0), "inputs")),
        outputs(ids(outputs_tensor, output.size(0), "outputs")),
        negatives(ids(negatives_tensor, output.size(0), "negatives")) {}

  i64 width() const { return 1 + draws; }
  // the row of score k of pair b
  i64 row(i64 b, i64 k) const { return k == 0 ? outputs[b] : negatives[b * draws + k - 1]; }
  bool skipped(i64 b, i64 k) const { return k > 0 && row(b, k) == outputs[b]; }

  Tensor inputs_tensor, outputs_tensor, negatives_tensor;
  i64 count, draws;
  const i64 *inputs, *outputs, *negatives;
};

template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& output, const Pairs& pairs,
                                   const std::string& reduction) {
  const Operand<T> in(input), out(output);
  const i64 n = pairs.count, width = pairs.width();
  Tensor slopes_tensor = empty({n, width}, kScalar<T>), rows_tensor = empty({n}, kScalar<T>);
  T *slopes = data<T>(slopes_tensor), *loss = data<T>(rows_tensor);
  const T scale = reduction == "mean" ? T(1) / static_cast<T>(n) : T(1);
  over_rows(n, 2.0 * n * width * in.cols, [&](Range mine) {
    Buffer<T> u_scratch(in.cols), v_scratch(in.cols);
    i64 ld;
    for (i64 b = mine.begin; b < mine.end; ++b) {
      T* s = slopes + b * width;
      const T* u = in.fetch(pairs.inputs[b], 1, u_scratch, &ld);
      for (i64 k = 0; k < width; ++k) {
        const bool skipped = pairs.skipped(b, k);
        s[k] = skipped ? kNone<T> : tiles<T>().dot(u, out.fetch(pairs.row(b, k), 1, v_scratch, &ld), in.cols);
      }
      s[0] = -s[0];
      T unused = 0;
      loss[b] = 0;
      tiles<T>().softplus_weights(s, width, 1, width, T(0), &scale, &loss[b], &unused);
      s[0] = -s[0];
    }
  });
  if (reduction == "none")
    return {rows_tensor, slopes_tensor};
  double total = 0;
  for (i64 b = 0; b < n; ++b) total += loss[b];
  Tensor result = empty({}, kScalar<T>);
  *data<T>(result) = static_cast<T>(reduction == "mean" ? total / static_cast<double>(n) : total);
  return {result, slopes_tensor};
}

std::tuple<Tensor, Tensor> skipgram(const Tensor& input, const Tensor& output, const Tensor& inputs,
                                    const Tensor& outputs, const Tensor& negatives, const std::string& reduction,
                                    bool) {
  const Pairs pairs(input, output, inputs, outputs, negatives);
  return with_type(input, output, [&](auto zero) { return forward<decltype(zero)>(input, output, pairs, reduction); });
}

// The scores that each row of a table takes part in, in order: positions sorted by row.
struct ByRow {
  template <typename Row>
  ByRow(i64 rows, i64 count, const Row& row) : first(rows + 1, 0), position(count) {
    for (i64 at = 0; at < count; ++at) ++first[row(at) + 1];
    for (i64 j = 0; j < rows; ++j) first[j + 1] += first[j];
    std::vector<i64> next(first.begin(), first.end() - 1);
    for (i64 at = 0; at < count; ++at) position[next[row(at)]++] = at;
  }

  // f(row, positions) on every row, those of a thread with as much work as another's
  template <typename F>
  void over_threads(double flops_a_position, const F& f) const {
    const i64 rows = static_cast<i64>(first.size()) - 1, count = static_cast<i64>(position.size());
    const i64 threads = useful_threads(flops_a_position * static_cast<double>(count + rows));
    const auto from = [&](i64 t) {  // where the rows before have t parts of the work, a row costing as a position
      i64 low = 0, high = rows;
      while (low < high) {
        const i64 middle = (low + high) / 2;
        if ((first[middle] + middle) * threads < (count + rows) * t)
          low = middle + 1;
        else
          high = middle;
      }
      return low;
    };
    run(threads, [&](i64 t) { f(Range{from(t), t + 1 == threads ? rows : from(t + 1)}); });
  }

  std::vector<i64> first, position;
};

// Upstream gradients: one number for all pairs, or one a pair.
template <typename T>
struct Upstream {
  explicit Upstream(const Tensor& grad, const Tensor& slopes_tensor)
      : grad_(data<T>(grad)),
        stride_(grad.dim() == 0 ? 0 : grad.stride(0)),
        slopes_(data<T>(slopes_tensor)),
        width_(slopes_tensor.size(1)) {}
  T weight(i64 b, i64 k) const { return grad_[b * stride_] * slopes_[b * width_ + k]; }

 private:
  const T* grad_;
  i64 stride_;
  const T* slopes_;
  i64 width_;
};

// sum += sum_k weight_k v_k of pair b
template <typename T>
void add_output_rows(const Upstream<T>& upstream, const Operand<T>& out, const Pairs& pairs, i64 b, T* scratch,
                     T* sum) {
  i64 ld;
  for (i64 k = 0; k < pairs.width(); ++k) {
    if (!pairs.skipped(b, k))
      tiles<T>().axpy(sum, upstream.weight(b, k), out.fetch(pairs.row(b, k), 1, scratch, &ld), out.cols);
  }
}

char* row_of(const Tensor& x, i64 row) {
  return static_cast<char*>(x.mutable_data_ptr()) + row * x.size(1) * static_cast<i64>(x.element_size());
}

Tensor nothing(const Tensor& like) { return empty({0}, like.scalar_type()); }

// sum over the positions of each row, written once; rows that nothing names are zero
template <typename T, typename Add>
Tensor gather_rows(const Tensor& weight, const ByRow& by_row, double flops_a_position, const Add& add) {
  const i64 dim = weight.size(1);
  Tensor grad = empty({weight.size(0), dim}, weight.scalar_type());
  by_row.over_threads(flops_a_position, [&](Range mine) {
    Buffer<T> sum(dim), scratch(dim);
    for (i64 j = mine.begin; j < mine.end; ++j) {
      std::fill_n(static_cast<T*>(sum), dim, T(0));
      for (i64 i = by_row.first[j]; i < by_row.first[j + 1]; ++i) add(by_row.position[i], scratch, sum);
      tiles<T>().store(sum, row_of(grad, j), kind(grad), dim, 1, dim);
    }
  });
  return grad;
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Upstream<T>& upstream, const Tensor& input, const Tensor& output,
                                    const Pairs& pairs, const std::vector<bool>& mask) {
  const Operand<T> in(input), out(output);
  const i64 width = pairs.width();
  Tensor dinput = nothing(input), doutput = nothing(output);
  if (mask[0]) {
    const ByRow by_row(in.rows, pairs.count, [&](i64 b) { return pairs.inputs[b]; });
    dinput = gather_rows<T>(input, by_row, 2.0 * width * in.cols,
                            [&](i64 b, T* scratch, T* sum) { add_output_rows(upstream, out, pairs, b, scratch, sum); });
  }
  if (mask[1]) {
    const ByRow by_row(out.rows, pairs.count * width, [&](i64 at) { return pairs.row(at / width, at % width); });
    doutput = gather_rows<T>(output, by_row, kFlopsAnElement * in.cols, [&](i64 at, T* scratch, T* sum) {
      i64 ld;
      const i64 b = at / width, k = at % width;
      if (!pairs.skipped(b, k))
        tiles<T>().axpy(sum, upstream.weight(b, k), in.fetch(pairs.inputs[b], 1, scratch, &ld), in.cols);
    });
  }
  return {dinput, doutput};
}

// what each pair adds, row by row
template <typename T>
std::tuple<Tensor, Tensor> backward_rows(const Upstream<T>& upstream, const Tensor& input, const Tensor& output,
                                         const Pairs& pairs, const std::vector<bool>& mask) {
  const Operand<T> in(input), out(output);
  const i64 width = pairs.width(), dim = in.cols;
  Tensor dinput = mask[0] ? empty({pairs.count, dim}, input.scalar_type()) : nothing(input);
  Tensor doutput = mask[1] ? empty({pairs.count * width, dim}, output.scalar_type()) : nothing(output);
  over_rows(pairs.count, kFlopsAnElement * pairs.count * width * dim, [&](Range mine) {
    Buffer<T> sum(dim), scratch(dim);
    i64 ld;
    for (i64 b = mine.begin; b < mine.end; ++b) {
      if (mask[0]) {
        std::fill_n(static_cast<T*>(sum), dim, T(0));
        add_output_rows<T>(upstream, out, pairs, b, scratch, sum);
        tiles<T>().store(sum, row_of(dinput, b), kind(dinput), dim, 1, dim);
      }
      if (!mask[1])
        continue;
      const T* u = in.fetch(pairs.inputs[b], 1, scratch, &ld);
      for (i64 k = 0; k < width; ++k) {
        const T weight = upstream.weight(b, k);
        std::fill_n(static_cast<T*>(sum), dim, T(0));
        if (!pairs.skipped(b, k))
          tiles<T>().axpy(sum, weight, u, dim);
        tiles<T>().store(sum, row_of(doutput, b * width + k), kind(doutput), dim, 1, dim);
      }
    }
  });
  return {dinput, doutput};
}

// either backward, in the dtype of the slopes
template <bool Rows>
std::tuple<Tensor, Tensor> gradients(const Tensor& grad, const Tensor& slopes_, const Tensor& input,
                                     const Tensor& output, const Tensor& inputs, const Tensor& outputs,
                                     const Tensor& negatives, const std::vector<bool>& mask) {
  const Pairs pairs(input, output, inputs, outputs, negatives);
  const Tensor slopes = torch::stable::contiguous(slopes_);
  STD_TORCH_CHECK(grad.scalar_type() == slopes.scalar_type(), "skipgram_backward: grad and slopes differ in dtype");
  return with_type(is_double(slopes), [&](auto zero) {
    using T = decltype(zero);
    const Upstream<T> upstream(grad, slopes);
    if constexpr (Rows)
      return backward_rows<T>(upstream, input, output, pairs, mask);
    else
      return backward<T>(upstream, input, output, pairs, mask);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("skipgram", TORCH_BOX(&skipgram));
  library.impl("skipgram_backward", TORCH_BOX(&gradients<false>));
  library.impl("skipgram_backward_rows", TORCH_BOX(&gradients<true>));
}

}  // namespace sslkernels
