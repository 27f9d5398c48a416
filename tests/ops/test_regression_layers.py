# SPDX-License-Identifier: Apache-2.0
"""average_layers against F.instance_norm over time, sum / K and F.layer_norm, as data2vec 2.0 makes its targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import _library, ops
from sslkernels.reference import regression as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def written_out(
    layers: list[Tensor], instance_norm: bool = True, layer_norm: bool = False, eps: float = 1e-5
) -> Tensor:
    if instance_norm:
        layers = [F.instance_norm(x.transpose(1, 2), eps=eps).transpose(1, 2) for x in layers]
    mean = sum(layers[1:], layers[0]) / len(layers)
    return F.layer_norm(mean, mean.shape[-1:], eps=eps) if layer_norm else mean


def check(layers: list[Tensor], **options: bool) -> None:
    """Never more than twice eager's error, plus the roundings of moments, deviation, product and sum."""
    double = any(x.dtype == torch.float64 for x in layers)
    exact = written_out([x.double() for x in layers], **options)
    eager = written_out([x.double() if double else x.float() for x in layers], **options)
    got = ops.average_layers(layers, **options)
    assert got.dtype == (torch.float64 if double else torch.float32) and got.shape == layers[0].shape
    # the truth for float64 is itself float64, and rounds its means before they are subtracted
    roundings = (1e-12 if double else 4 * torch.finfo(got.dtype).eps) * exact.norm()
    assert (got.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + roundings


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    # a block of 16 rows and its neighbours; a strip of columns and its
    batch, rows, width = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 15, 16, 17, 33, 196])), 0
    width = draw(st.sampled_from([1, 2, 5, 16, 31, 384, 1025]))
    torch.manual_seed(draw(st.integers(0, 99)))
    layers = [torch.randn(batch, rows, width).to(draw(st.sampled_from(DTYPES))) for _ in range(draw(st.integers(1, 4)))]
    # layer norm of few columns, or of a single layer's two rows, divides nearly nothing by nearly nothing
    layer_norm = draw(st.booleans()) if width >= 16 else False
    check(layers, instance_norm=draw(st.booleans()), layer_norm=layer_norm)


def test_strides() -> None:
    x = torch.randn(4, 3, 9, 20)
    layouts = [
        x[0, :, :, ::2],
        x[1, :, :, :10],
        x[2].transpose(1, 2)[:, :9, :9].transpose(1, 2),
        x[3, :1].expand(3, 9, 20),
    ]
    for layer in layouts:
        layer = layer[:, :, :9]
        assert not layer.is_contiguous()
        assert torch.equal(ops.average_layers([layer, layer]), ops.average_layers([layer.contiguous()] * 2))


def test_threads_and_repeats(threads: int) -> None:
    layers = [torch.randn(3, 200, 500) for _ in range(3)]
    check(layers, layer_norm=True)
    assert torch.equal(ops.average_layers(layers), ops.average_layers(layers))


@pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_instruction_set(dtype: torch.dtype, level: int) -> None:
    check([torch.randn(2, 37, 83).to(dtype) for _ in range(3)], layer_norm=True)


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_channels_far_from_zero(offset: float) -> None:
    layer = offset + torch.randn(2, 300, 40)
    exact = written_out([layer.double()])
    assert (ops.average_layers([layer]).double() - exact).norm() <= 1e-6 * exact.norm()


def test_first_rows_far_from_the_others() -> None:
    """The kernel guesses a mean from the first 16 rows; where they mislead it, it sums again."""
    layer = torch.randn(1, 3000, 40)
    layer[:, :16] += 1e4
    exact = written_out([layer.double()])
    assert (ops.average_layers([layer]).double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("rows", [2, 17, 500])
def test_constant_channels_become_zero(rows: int) -> None:
    layer = torch.randn(1, rows, 6)
    layer[:, :, 1], layer[:, :, 2], layer[:, :, 3] = 0.0, 0.1, -3e4
    got = ops.average_layers([layer])
    assert got[:, :, 1:4].abs().max() <= 1e-3  # what the mean's last bit leaves, over sqrt(eps)
    torch.testing.assert_close(got[:, :, [0, 4, 5]], written_out([layer])[:, :, [0, 4, 5]])


def test_what_is_not_finite_stays_in_its_channel() -> None:
    layers = [torch.randn(2, 20, 7) for _ in range(2)]
    layers[1][1, 3, 4] = torch.nan
    layers[0][0, 19, 2] = torch.inf
    got = ops.average_layers(layers)
    bad = torch.zeros(2, 7, dtype=torch.bool)
    bad[1, 4] = bad[0, 2] = True
    assert torch.equal(got.isfinite().all(1), ~bad) and got[1, :, 4].isnan().all()


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (2, 1, 3)])
def test_empty_and_single(shape: tuple[int, ...]) -> None:
    layer = torch.randn(shape)
    got = ops.average_layers([layer, layer], instance_norm=shape[1] != 1)
    assert got.shape == shape
    if shape[1] == 1:
        torch.testing.assert_close(got, layer)


def test_the_reference_is_the_definition() -> None:
    layers = [torch.randn(2, 9, 5, dtype=torch.float64) for _ in range(3)]
    for instance_norm in (True, False):
        for layer_norm in (True, False):
            options = {"instance_norm": instance_norm, "layer_norm": layer_norm}
            torch.testing.assert_close(reference.average_layers(layers, **options), written_out(layers, **options))


def test_layers_of_data2vec() -> None:
    """Instance norm does not commute with the choice of rows: it is over all of them (layer norm does)."""
    layers = [torch.randn(2, 30, 16, dtype=torch.float64) for _ in range(4)]
    ids = torch.stack([torch.randperm(30)[:12] for _ in range(2)])
    pred = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    y = written_out(layers, layer_norm=True)
    chosen = torch.stack([row[i] for row, i in zip(y, ids)])
    expected = ((pred - chosen) ** 2).sum(-1).div(16**0.5).sum() / 24
    averaged = ops.average_layers(layers)
    for target, normalize in ((ops.average_layers(layers, layer_norm=True), False), (averaged, True)):
        got = ops.masked_regression(pred, target, ids, loss="l2", scale=16**0.5, normalize_target=normalize)
        torch.testing.assert_close(got, expected)
