# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the patch ops, thread by thread on the CPU, against the reference. No GPU.

An id that names no place is refused by the reference on the CPU; here it answers as it does on a device.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sslkernels import _checks
from sslkernels.reference import _patches as reference

F32, F64, BF16, F16, U8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8
FLOATS = (F32, F64, BF16, F16)
FAR = 1 << 40  # an id that would leave any tensor
BAD = [[0, -1], [3, FAR], [-FAR, 2], [1, 4], [2, 2]]  # for four places


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "readable", lambda x: False)


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, but that NaN is NaN and zero has no sign."""
    alike = a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    return alike and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def near(a: Tensor, exact: Tensor, like: Tensor | None = None, scale: float = 8.0) -> bool:
    """Within some roundings in the arithmetic and one in the dtype, of the largest of what a sum adds up."""
    assert (a.shape, a.isnan().tolist()) == (exact.shape, exact.isnan().tolist())
    if a.numel() == 0:
        return True
    wide = torch.finfo(F64 if a.dtype == F64 else F32).eps
    size = float((exact if like is None else like).double().nan_to_num(0).abs().max())
    limit = scale * wide * size + torch.finfo(a.dtype).eps * exact.nan_to_num(0).abs()
    return bool(((a.double() - exact).nan_to_num(0).abs() <= limit).all())


def images_of(shape: Sequence[int], dtype: torch.dtype, layout: str = "planes") -> Tensor:
    def draw(*sizes: int) -> Tensor:
        return torch.randint(256, sizes).byte() if dtype == U8 else torch.randn(sizes).to(dtype)

    batch, channels, *sides = shape
    if layout == "pixels":  # channels_last in memory
        return draw(batch, *sides, channels).movedim(-1, 1)
    if layout == "sliced":
        return draw(batch, channels + 1, *sides[:-1], 2 * sides[-1] + 1)[:, 1:, ..., 1::2]
    if layout == "unaligned":
        return draw(batch * channels, *sides[:-1], sides[-1] + 1)[..., 1:].unflatten(0, (batch, channels))
    if layout == "expanded":
        return draw(1, *shape[1:]).expand(*shape)
    return draw(*shape)


def stats(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.rand(channels), torch.rand(channels) + 0.5]).to(dtype)


def wide(*dtypes: torch.dtype) -> torch.dtype:
    return F64 if F64 in dtypes else F32


def distinct(batch: int, count: int, length: int) -> Tensor:
    return torch.rand(batch, length).argsort(1)[:, :count]


# a row of 16 pixels is a vector of every dtype, 14 and 5 are not; (clip, patch)
SHAPES = [
    ((2, 3, 32, 48), (1, 16, 16)),
    ((2, 3, 28, 14), (1, 14, 14)),
    ((3, 1, 10, 15), (1, 5, 5)),
    ((1, 4, 4, 16, 8), (2, 8, 4)),
    ((2, 5, 3, 2), (1, 1, 1)),
    # one patch an image: channels and rows are one axis, whose vectors could span two channels
    ((2, 4, 5, 12), (1, 5, 12)),
    ((2, 2, 7, 2), (1, 7, 2)),
]
LAYOUTS = ["planes", "pixels", "sliced", "unaligned", "expanded"]


@pytest.mark.parametrize("last", [False, True], ids=["planes out", "pixels out"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "patch"), SHAPES, ids=str)
def test_gather_patches(emulated: Callable, shape: tuple, patch: tuple, layout: str, last: bool) -> None:
    length = int(np.prod([s // p for s, p in zip(shape[2:], patch[3 - len(shape[2:]) :])]))
    ids = torch.randint(length, (shape[0], 3))
    ids[-1, 1] = FAR
    for dtype in (F32, U8, BF16):
        images = images_of(shape, dtype, layout)
        for out in (F32, BF16):
            for given, places in ((None, ids), (stats(shape[1], F32), None)):
                args = (images, places, patch, last, given, out)
                got, want = emulated("gather_patches", *args), reference.gather_patches(*args)
                if given is None:
                    assert same(got, want)
                else:
                    exact = reference.gather_patches(*args[:4], given.double(), F64)
                    assert near(got, exact) and got.dtype == out


@pytest.mark.parametrize("last", [False, True], ids=["planes out", "pixels out"])
@pytest.mark.parametrize("dtype", [*FLOATS, U8], ids=str)
def test_gather_patches_dtypes(emulated: Callable, dtype: torch.dtype, last: bool) -> None:
    images, ids = images_of((2, 3, 16, 32), dtype), torch.tensor([[1, -1], [0, 1]])
    for out in FLOATS:
        args = (images, ids, (1, 16, 16), last, None, out)
        assert same(emulated("gather_patches", *args), reference.gather_patches(*args))
        given = stats(3, wide(dtype, out))
        got = emulated("gather_patches", *args[:4], given, out)
        assert near(got, reference.gather_patches(*args[:4], given.double(), F64))


def test_every_byte_is_divided_exactly(emulated: Callable) -> None:
    byte = torch.arange(256, dtype=U8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for last in (False, True):
        for out in (F32, F64):
            args = (byte, None, (1, 16, 16), last, None, out)
            assert same(emulated("gather_patches", *args), reference.gather_patches(*args))


def test_patches_larger_than_shared_memory(emulated: Callable) -> None:
    images, ids = images_of((2, 3, 80, 60), F32), torch.tensor([[0], [FAR]])
    args = (images, ids, (1, 80, 60), True, stats(3, F32), F32)
    assert near(emulated("gather_patches", *args), reference.gather_patches(*args[:4], args[4].double(), F64))
    pred, ids = torch.randn(2, 1, 14400), torch.zeros(2, 1, dtype=torch.int64)
    options = (pred, images, ids, (1, 80, 60), 1, 1e-6, False, True, None, 1, True)
    for got, want in zip(emulated("masked_patch_loss", *options), reference.masked_patch_loss(*options)):
        torch.testing.assert_close(got, want)


def test_offsets_past_32_bits(emulated: Callable) -> None:
    """Two samples and their channels lie gigabytes apart, in memory that nobody touches but here."""
    memory = torch.frombuffer(mmap.mmap(-1, 9 << 30), dtype=U8)  # the system hands out pages as they are written
    images = torch.as_strided(memory, (2, 2, 4, 8), (5 << 30, (1 << 31) + 8, 16, 1))
    images.random_(256)
    ids = torch.tensor([[1, 0], [0, 1]])
    for last in (False, True):
        args = (images, ids, (1, 4, 4), last, None, F32)
        assert same(emulated("gather_patches", *args), reference.gather_patches(*args))
    args = (images, ids, (1, 4, 4), False)
    assert same(emulated("permute_patches", *args), reference.permute_patches(*args))


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "pixels"])
def test_gather_patches_backward(emulated: Callable, last: bool, out: torch.dtype) -> None:
    for shape, patch in SHAPES:
        length = int(np.prod([s // p for s, p in zip(shape[2:], patch[3 - len(shape[2:]) :])]))
        values = shape[1] * int(np.prod(patch))
        ids = torch.randint(length, (shape[0], 6))  # with repeats
        ids[-1, 2], ids[0, 0] = FAR, -1
        for dtype in (out, F32):
            for places, given in ((ids, None), (None, stats(shape[1], wide(dtype, out)))):
                grad = torch.randn(shape[0], 6 if given is None else length, 2 * values).to(dtype)
                for one in (grad[..., ::2], grad[..., :values].contiguous()):
                    args = (one, places, shape, patch, last, given)
                    exact = reference.gather_patches_backward(
                        one.double(), places, shape, patch, last, None if given is None else given.double(), F64
                    )
                    assert near(emulated("gather_patches_backward", *args, out), exact)


@pytest.mark.parametrize("dtype", [*FLOATS, U8], ids=str)
def test_permute_patches(emulated: Callable, dtype: torch.dtype) -> None:
    for (shape, patch), layout in zip([*SHAPES, SHAPES[0], SHAPES[0]], [*LAYOUTS, "planes", "expanded"]):
        images = images_of(shape, dtype, layout)
        length = int(np.prod([s // p for s, p in zip(shape[2:], patch[3 - len(shape[2:]) :])]))
        ids = distinct(shape[0], length, length)
        for backwards in (False, True):
            args = (images, ids, patch, backwards)
            assert same(emulated("permute_patches", *args), reference.permute_patches(*args))
    images = images_of((3, 2, 8, 8), dtype)
    ids = torch.tensor([[3, 1, 2, 0], [0, 1, 1, 2], [0, 1, 2, FAR]])  # one of three is a permutation
    for backwards in (False, True):
        args = (images, ids, (1, 4, 4), backwards)
        assert same(emulated("permute_patches", *args), reference.permute_patches(*args))


@pytest.mark.parametrize("form", ["all", "bias", "position", "neither"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_embed_patches(emulated: Callable, dtype: torch.dtype, form: str) -> None:
    images, ids = torch.randn(2, 3, 8, 12, dtype=F64).to(dtype), torch.tensor([[5, -1, 0], [1, 1, 7]])
    weight = torch.randn(16, 48, dtype=F64).to(dtype)
    bias = torch.randn(16, dtype=F64).to(dtype) if form in ("all", "bias") else None
    position = torch.randn(6, 16, dtype=F64).to(dtype) if form in ("all", "position") else None
    for places in (ids, None):
        for table in (position, None if position is None else position.mT.contiguous().mT):
            args = (images, places, weight, bias, table, (1, 4, 4), False, None)
            got, want = emulated("embed_patches", *args), reference.embed_patches(*args)
            assert same(got[1], want[1])
            assert same(got[0], want[0])  # the product is the same one


@pytest.mark.parametrize("dim", [1, 8, 40, 96])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gather_tokens(emulated: Callable, dtype: torch.dtype, dim: int) -> None:
    tokens = torch.randn(2, 5, 2 * dim).to(dtype)
    ids = torch.tensor([[4, 0, 0, -1], [FAR, 1, 5, 2]])
    shared = ids.reshape(1, -1)
    for x, places in ((tokens[..., ::2], ids), (tokens[..., :dim], ids), (tokens[:1, :, 1 : dim + 1], shared)):
        assert same(emulated("gather_tokens", x, places), reference.gather_tokens(x, places))
    grad = torch.randn(2, 4, 2 * dim).to(dtype)
    for g in (grad[..., ::2], grad[..., :dim].contiguous(), grad[..., 1 : dim + 1]):
        exact = reference.gather_tokens_backward(g.double(), ids, 5)
        assert near(emulated("gather_tokens_backward", g, ids, 5), exact)


def test_gather_tokens_empty(emulated: Callable) -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    for tokens, ids in (
        (torch.randn(2, 3, 4), none),
        (torch.randn(2, 3, 0), none + 0),
        (torch.randn(0, 3, 4), none[:0]),
    ):
        assert same(emulated("gather_tokens", tokens, ids), reference.gather_tokens(tokens, ids))
        grad = torch.randn(*ids.shape, tokens.shape[2])
        assert same(emulated("gather_tokens_backward", grad, ids, 3), reference.gather_tokens_backward(grad, ids, 3))


@pytest.mark.parametrize("count", [1000, 1100], ids=["looked through", "sorted"])
def test_many_ids_of_one_place(emulated: Callable, count: int) -> None:
    """In float32 alone a sum of a thousand ones would lose three digits; and twice the same bits."""
    ids = torch.randint(3, (2, count))
    ids[:, ::7] = -1
    grad = 1 + 0.01 * torch.randn(2, count, 12)
    got = emulated("gather_tokens_backward", grad, ids, 4)
    exact = reference.gather_tokens_backward(grad.double(), ids, 4)
    assert near(got, exact, scale=0.5)
    assert torch.equal(got, emulated("gather_tokens_backward", grad, ids, 4))
    assert not got[:, 3].any()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("dim", [1, 8, 24])
def test_restore_tokens(emulated: Callable, dim: int, prefix: int) -> None:
    ids = torch.tensor([[4, 0, 2], [1, 5, 3], [1, 1, 2], [0, FAR, 2], [0, -1, 2]])
    for dtypes in [(d,) * 3 for d in FLOATS] + [(BF16, F32, F32), (F16, BF16, F16), (F32, BF16, F64), (F64, F32, F32)]:
        visible = torch.randn(5, prefix + 3, 2 * dim).to(dtypes[0])
        token, position = torch.randn(2 * dim).to(dtypes[1]), torch.randn(prefix + 6, dim).to(dtypes[2])
        for x, t, p in (
            (visible[..., ::2], token[::2], None),
            (visible[..., :dim].contiguous(), token[:dim], position),
            (visible[..., :dim], token[dim:], position.mT.contiguous().mT),
        ):
            args = (x, ids, t, p, 6, prefix)
            assert same(emulated("restore_tokens", *args), reference.restore_tokens(*args))


@pytest.mark.parametrize("batch", [1, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_restore_tokens_backward(emulated: Callable, dtype: torch.dtype, batch: int) -> None:
    for dim, prefix, count in ((8, 1, 3), (1, 0, 2), (34, 2, 0), (264, 0, 4))[: 4 if batch == 1 else 2]:
        grad = torch.randn(batch, prefix + 4, dim + 1).to(dtype)
        ids = distinct(batch, count, 4)
        for g in (grad[..., :dim].contiguous(), grad[..., 1:]):
            for mask in ((True, True, True), (False, True, False), (True, False, True)):
                got = emulated("restore_tokens_backward", g, ids, prefix, mask)
                exact = reference.restore_tokens_backward(g.double(), ids, prefix, mask)
                like = reference.restore_tokens_backward(g.double().abs(), ids, prefix, mask)
                assert [x.dtype for x in got] == [g.dtype, wide(dtype), wide(dtype)]
                assert all(map(near, got, exact, like))
    grad, ids = torch.randn(2, 4, 8).to(dtype), torch.tensor([[0, -1, FAR], [2, 2, 1]])
    got = emulated("restore_tokens_backward", grad, ids, 0, (True, False, False))
    assert same(got[0], reference.restore_tokens_backward(grad, ids, 0, (True, False, False))[0])


def test_restore_tokens_sums_are_accurate(emulated: Callable) -> None:
    grad = 1 + 0.01 * torch.randn(300, 3, 8)
    none = torch.zeros(300, 0, dtype=torch.int64)
    _, token, position = emulated("restore_tokens_backward", grad, none, 0, (False, True, True))
    assert near(token, grad.double().sum((0, 1)), scale=0.5)
    assert near(position, grad.double().sum(0), scale=0.5)


def loss_args(pred: Tensor, images: Tensor, ids: Tensor, patch: tuple, **options: Any) -> tuple:
    given = {"normalize": 1, "eps": 1e-6, "l1": False, "last": True, "mean_std": None} | options
    return (pred, images, ids, patch, *given.values())


@pytest.mark.parametrize("normalize", [0, 1, 2], ids=["raw", "patch", "channel"])
@pytest.mark.parametrize("l1", [False, True], ids=["l2", "l1"])
@pytest.mark.parametrize(("shape", "patch"), SHAPES[:4], ids=str)
def test_masked_patch_loss(emulated: Callable, shape: tuple, patch: tuple, normalize: int, l1: bool) -> None:
    length = int(np.prod([s // p for s, p in zip(shape[2:], patch[3 - len(shape[2:]) :])]))
    values, count = shape[1] * int(np.prod(patch)), max(length - 1, 1)
    ids = distinct(shape[0], count, length)
    kinds = [(F32, "planes", F32), (U8, "pixels", BF16), (BF16, "sliced", F16), (F16, "unaligned", F32)]
    for i, (dtype, layout, pred_dtype) in enumerate(kinds):
        images = images_of(shape, dtype, layout)
        rows = (count, length)[i % 2]
        pred = torch.randn(shape[0], rows, values + 1).to(pred_dtype)
        pred = pred[..., 1:] if i == 2 else pred[..., :values].contiguous()
        given = stats(shape[1], F32) if i > 1 else None
        options = {"normalize": normalize, "l1": l1, "last": i < 3}
        args = loss_args(pred, images, ids, patch, **options, mean_std=given)
        given = None if given is None else given.double()
        exact_args = loss_args(pred.double(), images, ids, patch, **options, mean_std=given)
        upstream = torch.randn(ids.shape)
        got = [emulated("masked_patch_loss", *args, reduction, True) for reduction in range(3)]
        want = [reference.masked_patch_loss(*exact_args, reduction, True) for reduction in range(3)]
        got.append((emulated("masked_patch_loss_backward", upstream, *args),))
        want.append((reference.masked_patch_loss_backward(upstream.double(), *exact_args),))
        for a, b in zip(got, want):
            for x, exact in zip(a, b):
                assert near(x, exact, scale=64)
        assert torch.equal(got[1][0], emulated("masked_patch_loss", *args, 1, False)[0])


@pytest.mark.parametrize("images_dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("pred_dtype", FLOATS, ids=str)
def test_masked_patch_loss_in_double(emulated: Callable, images_dtype: torch.dtype, pred_dtype: torch.dtype) -> None:
    images = images_of((2, 3, 8, 16), images_dtype)
    pred = torch.randn(2, 2, 192, dtype=F64).to(pred_dtype)
    ids = distinct(2, 2, 2)
    args = loss_args(pred, images, ids, (1, 8, 8), normalize=2)
    exact = loss_args(pred.double(), images.double(), ids, (1, 8, 8), normalize=2)
    for x, y in zip(emulated("masked_patch_loss", *args, 1, True), reference.masked_patch_loss(*exact, 1, True)):
        assert x.dtype == wide(images_dtype, pred_dtype) and near(x, y, scale=64)
    upstream = torch.randn(2, 2)
    got = emulated("masked_patch_loss_backward", upstream, *args)
    assert got.dtype == pred_dtype
    assert near(got, reference.masked_patch_loss_backward(upstream.double(), *exact), scale=64)


@pytest.mark.parametrize("rows", [2, 4], ids=["a row for each id", "a row for each patch"])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_ids_of_masked_patch_loss(emulated: Callable, bad: list[int], rows: int) -> None:
    images, pred = images_of((2, 1, 8, 8), F32), torch.randn(2, rows, 16)
    ids = torch.tensor([[0, 3], bad])
    args = loss_args(pred, images, ids, (1, 4, 4))
    for reduction in range(3):
        got = emulated("masked_patch_loss", *args, reduction, True)
        want = reference.masked_patch_loss(*args, reduction, True)
        assert got[0].isnan().any()
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y, equal_nan=True)
    upstream = torch.randn(2, 2)
    got = emulated("masked_patch_loss_backward", upstream, *args)
    torch.testing.assert_close(got, reference.masked_patch_loss_backward(upstream, *args), equal_nan=True)


def test_faint_and_constant_patches(emulated: Callable) -> None:
    """Far from zero, where squares would cancel: a constant patch is zeros, a faint one keeps its digits."""
    images = 1000 + 1e-3 * torch.randn(1, 3, 16, 32)
    images[..., :16] = 1000
    pred, ids = torch.zeros(1, 2, 768), torch.tensor([[0, 1]])
    for normalize in (1, 2):
        args = loss_args(pred, images, ids, (1, 16, 16), normalize=normalize)
        exact = loss_args(pred, images.double(), ids, (1, 16, 16), normalize=normalize)
        loss, want = emulated("masked_patch_loss", *args, 0, False)[0], reference.masked_patch_loss(*exact, 0, False)[0]
        assert loss[0, 0] == 0
        assert near(loss, want, scale=64)


def test_nan_and_infinity(emulated: Callable) -> None:
    images = torch.randn(2, 3, 16, 16)
    images[0, 0, 0, 0], images[1, 2, 3, 4] = torch.nan, torch.inf
    pred, ids = torch.randn(2, 1, 768), torch.zeros(2, 1, dtype=torch.int64)
    for normalize in range(3):
        args = loss_args(pred, images, ids, (1, 16, 16), normalize=normalize)
        for reduction in (0, 1):
            got = emulated("masked_patch_loss", *args, reduction, True)
            for x, y in zip(got, reference.masked_patch_loss(*args, reduction, True)):
                torch.testing.assert_close(x, y, equal_nan=True)
