# SPDX-License-Identifier: Apache-2.0
"""Soft cross-entropy of logits that are there: peaks of all rows, then one visit that has everything.

The visit's program owns BLOCK prototypes of one sample: it makes the probabilities of the sample's teachers once and
meets all student views with them, so a student element costs two exponentials, whatever the number of pairs. For DINO
(64 samples, 2 + 10 views, 65,536 prototypes, bfloat16) students are read twice (2 x 84 MB, the second time partly from
the L2 cache, as the visit begins where the peaks ended), teachers too (2 x 17 MB), and gradients written once (84 MB):
286 MB, 85 us at 3.35 TB/s, against 25 us of exponentials. One reading would need a row, 128 KiB, on chip.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sslkernels.triton._distillation_rows import (
    as_views,
    center_strides,
    find_peaks,
    load_row,
    mean_rows,
    softmax_rows,
)
from sslkernels.triton._launch import cdiv, launch, shape
from sslkernels.triton._tiles import LOG2E, log1p


@triton.jit
def shares_kernel(weight, numbers, batch, weight_stride, pairs, steepness, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """numbers = norm, scale: what weights are multiplied by in the result, and gradients after the op."""
    total = tl.zeros((BLOCK,), tl.float32)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        w = tl.load(weight + b.to(tl.int64) * weight_stride, mask=b < batch, other=0.0).to(tl.float32)
        total += w
        most = tl.maximum(most, tl.abs(w), propagate_nan=tl.PropagateNan.ALL)
    norm = 1.0
    if MEAN:
        norm = 1 / (tl.sum(total, 0) * pairs)
    scale = 1.0
    if steepness > 0:
        scale = tl.max(most, 0) * tl.abs(norm) * steepness
        scale = tl.where(scale > 0, scale, 1.0)
    tl.store(numbers, norm)
    tl.store(numbers + 1, scale)


@triton.jit
def probability(teacher, center, v, end, row, column_stride, center_stride, top, excess, factor):
    """softmax(teacher - center) of a row by its peak, at the places v < end."""
    y = load_row(teacher, center, v, end, column_stride, center_stride)
    return tl.exp2((y - tl.load(top + row)) * factor) / (1 + tl.load(excess + row))


@triton.jit
def meet_kernel(
    student, gradient, teacher, center, weight, numbers, upstream, partial,
    s_top, s_excess, s_at, t_top, t_excess, t_at, norm, scale, s_factor, t_factor, steepness,
    batch, columns, first, students, teachers, excluded,
    s_view, s_row, s_column, g_view, g_row, g_column, t_view, t_row, t_column,
    center_view, center_stride, weight_stride, up_view, up_row, BLOCK: tl.constexpr,
):  # fmt: skip
    """All student views of one tensor with all teachers of a sample, BLOCK prototypes at a time.

    The view `first + s` of fewer than `excluded` does not meet the teacher of its number. `gradient` may be `student`;
    `partial` takes each row's loss over these prototypes. Whatever is None is not made.
    """
    parts = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    b = (batch - 1 - program // parts).to(tl.int64)  # the peaks were found in the other order
    part = program % parts
    v = part * BLOCK + tl.arange(0, BLOCK)
    weight_of_sample = 1.0
    if weight is not None:
        weight_of_sample = tl.load(weight + b * weight_stride).to(tl.float32)
    if numbers is not None:
        norm = tl.load(numbers)
        scale = tl.load(numbers + 1)
    read = tl.where(weight_of_sample == 0, 0, columns)

    # two views are on their way while one is computed
    last = first + students
    student += b * s_row + v.to(tl.int64) * s_column
    x = tl.load(student, mask=v < read, other=0.0)
    ahead = tl.load(student + s_view, mask=v < tl.where(first + 1 < last, read, 0), other=0.0)
    teacher += b * t_row
    everyone = tl.zeros((BLOCK,), tl.float32)
    for t in range(0, teachers):
        view = tl.cast(t, tl.int64)
        shift = center
        if center is not None:
            shift = center + view * center_view
        row = view * batch + b
        everyone += probability(
            teacher + view * t_view, shift, v, read, row, t_column, center_stride, t_top, t_excess, t_factor
        )

    for s in range(0, students):
        own = x.to(tl.float32)
        x = ahead
        limit = tl.where(first + s + 2 < last, read, 0)
        ahead = tl.load(student + tl.cast(s + 2, tl.int64) * s_view, mask=v < limit, other=0.0)
        row = tl.cast(first + s, tl.int64) * batch + b
        barred = tl.where(first + s < excluded, first + s, -1)  # the teacher that this view does not meet
        number = tl.cast(teachers - tl.where(barred >= 0, 1, 0), tl.float32)
        target = everyone
        if barred >= 0:
            target = tl.zeros((BLOCK,), tl.float32)
            for t in range(0, teachers):
                if t != barred:
                    view = tl.cast(t, tl.int64)
                    shift = center
                    if center is not None:
                        shift = center + view * center_view
                    other = view * batch + b
                    target += probability(
                        teacher + view * t_view, shift, v, read, other, t_column, center_stride, t_top, t_excess,
                        t_factor,
                    )  # fmt: skip
        w = weight_of_sample
        if upstream is not None:
            w *= tl.load(upstream + tl.cast(first + s, tl.int64) * up_view + b * up_row).to(tl.float32)
        live = (w != 0) & (number > 0)
        excess = tl.load(s_excess + row)
        d = own - tl.load(s_top + row)
        if gradient is not None:
            inverse = 1 / (1 + excess)
            slope = tl.exp2(d * s_factor) * (number * inverse) - target
            at = tl.load(s_at + row)
            if (at // BLOCK == part) & (excess < 1):
                # slopes sum to zero: where one prototype has most of the mass, its own is that of the others, and so
                # is what a teacher leaves to them
                rest = excess * 0.0
                for t in range(0, teachers):
                    view = tl.cast(t, tl.int64)
                    shift = center
                    if center is not None:
                        shift = center + view * center_view
                    other = view * batch + b
                    far = tl.load(t_excess + other)
                    p = probability(
                        teacher + view * t_view, shift, at, read, other, t_column, center_stride, t_top, t_excess,
                        t_factor,
                    )  # fmt: skip
                    left = tl.where(tl.load(t_at + other) == at, far / (1 + far), 1 - p)
                    rest += tl.where(barred == t, 0.0, left)
                slope = tl.where(v == at, rest - number * (excess * inverse), slope)
            g = tl.where(live, slope * (w * norm * steepness / scale), 0.0).to(gradient.dtype.element_ty)
            place = tl.cast(s, tl.int64) * g_view + b * g_row + v.to(tl.int64) * g_column
            tl.store(gradient + place, g, mask=v < columns)
        if partial is not None:
            value = tl.sum(tl.where(v < columns, target * -d, 0.0), 0) * steepness
            value += tl.where(part == 0, number * log1p(excess), 0.0)
            tl.store(partial + row * parts + part, tl.where(live, value, 0.0) * (w * norm))


class _Visit:
    """What all ops do with the logits; `numbers` or `norm` say what the weights are multiplied by."""

    def __init__(self, student, teacher, center, row_weight, student_temp, teacher_temp, exclude):
        self.students = [as_views(x) for x in student]
        # a student meets all teachers at once: those of several tensors are put together
        self.teacher = as_views(teacher[0]) if len(teacher) == 1 else torch.cat([as_views(x) for x in teacher])
        self.center, self.row_weight = center, row_weight
        self.temperatures = student_temp, teacher_temp
        self.count, self.batch = sum(x.shape[0] for x in self.students), self.teacher.shape[1]
        self.width = self.teacher.shape[2]
        self.excluded = min(self.count, len(self.teacher)) if exclude else 0
        self.pairs = self.count * len(self.teacher) - self.excluded
        self.tile = shape("meet", self.students[0], self.teacher)
        self.parts = cdiv(self.width, self.tile["BLOCK"])

    def partial(self):
        return self.teacher.new_empty(self.count, self.batch, self.parts, dtype=torch.float32)

    def run(self, gradients, partial=None, upstream=None, numbers=None, norm=1.0, scale=1.0):
        """`gradients`: one a student tensor, None where nobody wants it."""
        student_temp, teacher_temp = self.temperatures
        peaks = [
            *find_peaks(self.students, None, student_temp, self.row_weight),
            *find_peaks([self.teacher], self.center, teacher_temp, self.row_weight),
        ]
        factors = norm, scale, LOG2E.value / student_temp, LOG2E.value / teacher_temp, 1 / student_temp
        weight_stride = 0 if self.row_weight is None else self.row_weight.stride(0)
        ends = *center_strides(self.center), weight_stride, *((0, 0) if upstream is None else upstream.stride())
        first = 0
        for x, g in zip(self.students, gradients):
            sizes = self.batch, self.width, first, x.shape[0], len(self.teacher), self.excluded
            first += x.shape[0]
            if g is None and partial is None:
                continue
            strides = *x.stride(), *((0, 0, 0) if g is None else as_views(g).stride()), *self.teacher.stride(), *ends
            operands = x, g, self.teacher, self.center, self.row_weight, numbers, upstream, partial, *peaks
            launch(meet_kernel, (self.batch * self.parts,), *operands, *factors, *sizes, *strides, **self.tile)


def share_numbers(row_weight, pairs, batch, steepness, mean):
    """norm, scale, None; of weights, whose sum only the device knows, 1, 1 and a tensor of both.

    Gradients are divided by the scale, which is 1 where `steepness` is 0.
    """
    if row_weight is None:
        norm = (1 / (pairs * batch) if batch else math.inf) if mean else 1.0
        return norm, norm * steepness if steepness and batch else 1.0, None
    numbers = row_weight.new_empty(2, dtype=torch.float32)
    operands = row_weight, numbers, batch, row_weight.stride(0), pairs, steepness
    launch(shares_kernel, (1,), *operands, MEAN=mean, **shape("row", row_weight))
    return 1.0, 1.0, numbers


def _total(student, gradients, teacher, center, row_weight, student_temp, teacher_temp, exclude, mean, need_mean):
    """loss, mean of the teacher, scale; gradients are written where they are not None."""
    visit = _Visit(student, teacher, center, row_weight, student_temp, teacher_temp, exclude)
    # float16 gradients fill their range, and wait scaled
    steepness = len(visit.teacher) / student_temp / 2**15 if student[0].dtype == torch.float16 else 0.0
    norm, scale, numbers = share_numbers(row_weight, visit.pairs, visit.batch, steepness, mean)
    partial = visit.partial()
    visit.run(gradients, partial, None, numbers, norm, scale)
    loss = partial.sum() if visit.batch else partial.new_full((), math.nan if mean else 0.0)
    emission = torch.full_like(loss, scale) if numbers is None else numbers[1].clone()
    return loss, mean_rows(visit.teacher) if need_mean else partial.new_empty(0), emission


def _fresh(student, wanted):
    return [x.new_empty(x.shape) if w else None for x, w in zip(student, wanted)]


def _or_empty(student, gradients):
    return [x.new_empty(0) if g is None else g for x, g in zip(student, gradients)]


def soft_cross_entropy(student, teacher, center, row_weight, student_temp, teacher_temp, exclude, mean, wanted):
    gradients = _fresh(student, wanted)
    options = center, row_weight, student_temp, teacher_temp, exclude, mean, wanted[-1]
    return [*_total(student, gradients, teacher, *options), *_or_empty(student, gradients)]


def soft_cross_entropy_(student, teacher, center, row_weight, student_temp, teacher_temp, exclude, mean, wanted):
    gradients = [x if w else None for x, w in zip(student, wanted)]
    return _total(
        student, gradients, teacher, center, row_weight, student_temp, teacher_temp, exclude, mean, wanted[-1]
    )


def soft_cross_entropy_rows(student, teacher, center, row_weight, student_temp, teacher_temp, exclude, need_mean):
    visit = _Visit(student, teacher, center, row_weight, student_temp, teacher_temp, exclude)
    partial = visit.partial()
    visit.run([None] * len(student), partial)
    return [partial.sum(-1), mean_rows(visit.teacher) if need_mean else partial.new_empty(0)]


def soft_cross_entropy_rows_backward(
    grad, student, teacher, center, row_weight, student_temp, teacher_temp, exclude, wanted
):
    visit = _Visit(student, teacher, center, row_weight, student_temp, teacher_temp, exclude)
    gradients = _fresh(student, wanted)
    visit.run(gradients, upstream=grad)
    return _or_empty(student, gradients)


def softmax_center(logits, center, temperature):
    x = as_views(logits)
    center = None if center is None else center.reshape(1, -1)
    return softmax_rows(x, center, temperature)[0], mean_rows(x)
