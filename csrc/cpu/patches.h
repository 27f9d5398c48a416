// SPDX-License-Identifier: Apache-2.0
// What the patch kernels share: the grid of patches, ids that are checked before anything is written, and reading one
// patch into dense values.
#pragma once

#include "cpu/operand.h"

namespace sslkernels {

// One patch in memory: its sizes and strides, in elements.
struct PatchShape {
  i64 channels, t, p, q;
  i64 channel_stride, t_stride, p_stride, q_stride;
  i64 values() const { return channels * t * p * q; }
};

// Images (B, C, H, W) or clips (B, C, T, H, W) as a grid of patches; data of any dtype and strides.
class Grid {
 public:
  Grid(const Tensor& images, const std::vector<i64>& patch)
      : batch(images.size(0)), bytes(static_cast<i64>(images.element_size())), dtype(kind(images)) {
    data_ = static_cast<char*>(images.mutable_data_ptr());
    const i64 rank = images.dim(), h = rank - 2, w = rank - 1;
    shape = {images.size(1),   patch[0],        patch[1], patch[2], images.stride(1), rank == 5 ? images.stride(2) : 0,
             images.stride(h), images.stride(w)};
    batch_stride_ = images.stride(0);
    rows_ = images.size(h) / patch[1];
    cols_ = images.size(w) / patch[2];
    length = (rank == 5 ? images.size(2) / patch[0] : 1) * rows_ * cols_;
  }

  // the first element of patch `id` of sample b
  char* at(i64 b, i64 id) const {
    const i64 frame = id / (rows_ * cols_), row = id / cols_ % rows_, col = id % cols_;
    return data_ + bytes * (b * batch_stride_ + frame * shape.t * shape.t_stride + row * shape.p * shape.p_stride +
                            col * shape.q * shape.q_stride);
  }

  PatchShape shape;
  i64 batch, length, bytes;
  Dtype dtype;

 private:
  char* data_;
  i64 batch_stride_, rows_, cols_;
};

// Rows of ids in [0, length), checked; `distinct`: none twice in a row.
class Ids {
 public:
  Ids(const Tensor& ids, i64 length, bool distinct) : rows(ids.size(0)), count(ids.size(1)), values_(rows * count) {
    const i64* data = static_cast<const i64*>(ids.const_data_ptr());
    const i64 row_stride = ids.stride(0), stride = ids.stride(1);
    std::vector<i64> last(distinct ? length : 0, -1);
    for (i64 b = 0; b < rows; ++b) {
      for (i64 k = 0; k < count; ++k) {
        const i64 id = data[b * row_stride + k * stride];
        STD_TORCH_CHECK(id >= 0 && id < length, "ids must be in [0, ", length, "), got ", id);
        if (distinct) {
          STD_TORCH_CHECK(last[id] != b, "ids must not repeat within a sample, got ", id, " more than once");
          last[id] = b;
        }
        values_[b * count + k] = id;
      }
    }
  }

  i64 operator[](i64 i) const { return values_[i]; }

  // Of each of the rows * length places: the position in this list that names it, -1 if none does. Ids are distinct.
  std::vector<i64> inverse(i64 length) const {
    std::vector<i64> position(rows * length, -1);
    for (i64 i = 0; i < rows * count; ++i) position[i / count * length + values_[i]] = i;
    return position;
  }

  const i64 rows, count;

 private:
  std::vector<i64> values_;
};

// Pixels as numbers of type T: bytes divided by 255, then (x - mean) / std for each channel.
template <typename T>
class Pixels {
 public:
  // values that are what they will be
  Pixels() : dtype_(std::is_same_v<T, double> ? Dtype::kDouble : Dtype::kFloat) {}

  // `mean_std` is (2, C)
  Pixels(const Grid& grid, const Optional& mean_std) : dtype_(grid.dtype) {
    if (!mean_std)
      return;
    STD_TORCH_CHECK(mean_std->scalar_type() == kScalar<T>, "mean_std must be of the dtype of the arithmetic");
    const T* rows = data<T>(*mean_std);
    const double unit = dtype_ == Dtype::kByte ? 255 : 1;
    for (i64 c = 0; c < grid.shape.channels; ++c) {
      shift_.push_back(static_cast<T>(unit * rows[c * mean_std->stride(1)]));
      factor_.push_back(static_cast<T>(1 / (unit * rows[mean_std->stride(0) + c * mean_std->stride(1)])));
    }
  }

  // The values of a patch of `shape` at `src`, dense in the order (c, t, p, q), or (t, p, q, c) if channels_last.
  void read(const void* src, const PatchShape& shape, bool channels_last, T* dst) const;

  // what a channel is multiplied by, null if nothing
  const T* factor() const { return factor_.empty() ? nullptr : factor_.data(); }

 private:
  Dtype dtype_;
  std::vector<T> shift_, factor_;
};

// A copy past the caches, for results larger than they are; a thread ends its copies with finish_streams().
constexpr i64 kStreamBytes = i64(4) << 20;
void stream(const void* src, void* dst, i64 bytes);
void finish_streams();

}  // namespace sslkernels
