# SPDX-License-Identifier: Apache-2.0
"""The patch ops against what they mean, patch by patch in float64: shapes, dtypes, layouts, threads, levels."""

from __future__ import annotations

from typing import Any

import patches_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import ops
from sslkernels.reference import patches as reference

F32, F64, BF16, F16, U8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8
FLOATS = (F32, F64, BF16, F16)
quick = settings(max_examples=40, deadline=None)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=-7.5), b.nan_to_num(nan=-7.5)) and torch.equal(a.isnan(), b.isnan())


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """Images or clips, a patch that divides them, and their layout; sides around the 16 that has a loop of its own."""
    clip = draw(st.booleans())
    patch = [draw(st.sampled_from([1, 2, 3, 5, 16, 17])) for _ in range(2)]
    sides = [p * draw(st.integers(1, 3)) for p in patch]
    if clip:
        t = draw(st.sampled_from([1, 2, 3]))
        patch, sides = [t, *patch], [t * draw(st.integers(1, 2)), *sides]
    channels = draw(st.sampled_from([1, 2, 3, 3, 3, 4]))
    batch = draw(st.sampled_from([1, 2, 5]))
    length = 1
    for side, p in zip(sides, patch):
        length *= side // p
    torch.manual_seed(draw(st.integers(0, 2**20)))
    return {
        "patch": patch,
        "length": length,
        "layout": draw(st.sampled_from(cases.LAYOUTS)),
        "shape": (batch, channels, sides),
        "channels_last": draw(st.booleans()),
    }


# gather_patches


@quick
@given(problems(), st.sampled_from((*FLOATS, U8)), st.sampled_from((None, *FLOATS)), st.booleans(), st.integers(0, 6))
def test_gather_patches(x: dict, dtype: torch.dtype, out: torch.dtype | None, normalized: bool, count: int) -> None:
    """Repeats allowed. Without mean and std values are exact: only the dtype rounds them."""
    images = cases.images_of(*x["shape"], dtype, x["layout"])
    batch, channels, _ = x["shape"]
    ids = torch.randint(x["length"], (batch, count))
    stats = {"mean": [0.4, 0.5, 0.6, 0.1][:channels], "std": [0.2, 0.3, 0.25, 2.0][:channels]} if normalized else {}
    got = ops.gather_patches(images, ids, x["patch"], channels_last=x["channels_last"], dtype=out, **stats)
    out = out or (F32 if dtype == U8 else dtype)
    assert (got.dtype, got.shape[:2]) == (out, (batch, count)) and got.is_contiguous()
    exact = images.double() / 255 if dtype == U8 else images.double()
    if normalized:
        view = (1, channels, *(1,) * len(x["patch"]))
        mean, std = (torch.tensor(s, dtype=F64).view(view) for s in stats.values())
        exact = (exact - mean) / std
    exact = cases.cut(exact, x["patch"], x["channels_last"])
    exact = exact.gather(1, ids[..., None].expand(-1, -1, exact.shape[2]))
    if normalized:
        eager = (images.float() / 255 if dtype == U8 else images.float()).abs().max() / 0.2 + 3
        limit = (
            torch.finfo(out).eps * exact.abs() + 4 * torch.finfo(F32 if F64 not in (dtype, out) else F64).eps * eager
        )
        assert ((got.double() - exact).abs() <= limit).all()
    else:
        assert torch.equal(got, exact.to(F64 if F64 in (dtype, out) else F32).to(out))


@quick
@given(problems(), st.sampled_from(FLOATS), st.booleans(), st.integers(1, 6))
def test_gather_patches_backward(x: dict, dtype: torch.dtype, normalized: bool, count: int) -> None:
    images = cases.images_of(*x["shape"], dtype, x["layout"]).detach().requires_grad_()
    batch, channels, _ = x["shape"]
    ids = torch.randint(x["length"], (batch, count))
    stats = {"mean": [0.0] * channels, "std": [0.5, 2.0, 4.0, 0.25][:channels]} if normalized else {}
    got = ops.gather_patches(images, ids, x["patch"], channels_last=x["channels_last"], **stats)
    cotangent = torch.randn(got.shape).to(dtype)
    exact = images.detach().double().requires_grad_()
    taken = cases.cut(exact, x["patch"], x["channels_last"])
    taken = taken.gather(1, ids[..., None].expand(-1, -1, taken.shape[2]))
    factor = 1 / torch.tensor(stats["std"], dtype=F64).view(-1, *(1,) * len(x["patch"])) if normalized else 1
    want, size = (factor * cases.gradients(taken, [exact], c)[0] for c in (cotangent, cotangent.abs()))
    cases.close(cases.gradients(got, [images], cotangent)[0], want, size)


def test_all_patches_are_the_convolution() -> None:
    conv = torch.nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4)).double()
    clips = torch.randn(2, 3, 4, 8, 12, dtype=F64)
    rows = torch.nn.functional.linear(ops.gather_patches(clips, None, (2, 4, 4)), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(rows, conv(clips).flatten(2).mT)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_byte_is_divided_exactly(level: int, layout: str, channels_last: bool) -> None:
    """x / 255 to the last bit, in float32 and float64, by all loops of all instruction sets."""
    byte = torch.arange(256, dtype=U8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    byte = byte.contiguous(memory_format=getattr(torch, layout + "_format" * (layout == "contiguous")))
    for dtype in (F32, F64):
        want = cases.cut(byte.to(dtype) / 255, (16, 16), channels_last)
        assert torch.equal(ops.gather_patches(byte, None, 16, channels_last=channels_last, dtype=dtype), want)


def test_levels_agree(level: int) -> None:
    for layout in cases.LAYOUTS:
        images = cases.images_of(2, 3, (32, 48), F32, layout)
        ids = cases.distinct_ids(2, 4, 6)
        pred = torch.randn(2, 4, 768, requires_grad=True)
        for last in (False, True):
            assert torch.equal(
                ops.gather_patches(images, ids, 16, channels_last=last),
                reference.gather_patches(images, ids, 16, channels_last=last),
            )
            loss = ops.masked_patch_loss(pred, images, ids, 16, normalize="channel", channels_last=last)
            exact = reference.masked_patch_loss(pred, images.double(), ids, 16, normalize="channel", channels_last=last)
            torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
            torch.testing.assert_close(*(torch.autograd.grad(x, pred)[0] for x in (loss, exact)), rtol=1e-5, atol=1e-9)


def test_ids_of_all_samples() -> None:
    images, ids = torch.rand(3, 3, 8, 8), torch.tensor([3, 0])
    assert torch.equal(ops.gather_patches(images, ids, 4), ops.gather_patches(images, ids.expand(3, -1), 4))


# gather_tokens


@quick
@given(
    st.sampled_from([1, 2, 7]), st.integers(1, 9), st.sampled_from([1, 15, 16, 33]), st.sampled_from(FLOATS), st.data()
)
def test_gather_tokens(batch: int, length: int, dim: int, dtype: torch.dtype, data: Any) -> None:
    """With repeats, up to 40 of them; masks of a sample; a shared table; rows and columns that are not dense."""
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    masks = data.draw(st.sampled_from([None, 1, 3]))
    count = data.draw(st.sampled_from([0, 1, 4, 40]))
    shared = data.draw(st.booleans())
    ids = torch.randint(length, (batch, count) if masks is None else (batch, masks, count))
    shape = (length, dim) if shared else (batch, length, dim)
    tokens = torch.randn(*shape[:-1], 2 * dim).to(dtype)[..., ::2] if data.draw(st.booleans()) else torch.randn(shape)
    tokens = tokens.to(dtype).requires_grad_()
    got = ops.gather_tokens(tokens, ids)
    exact = tokens.detach().double().requires_grad_()
    want = torch.stack([(exact if shared else exact[b])[i] for b, i in enumerate(ids)])
    assert torch.equal(got.double(), want)
    cotangent = torch.randn(got.shape).to(dtype)
    wanted, sizes = (cases.gradients(want, [exact], c)[0] for c in (cotangent, cotangent.abs()))
    cases.close(cases.gradients(got, [tokens], cotangent)[0], wanted, sizes)


def test_sums_of_many_rows_are_accurate() -> None:
    """100,000 float32 ones plus noise on one row: sums in order would lose four digits."""
    table = torch.zeros(2, 16, requires_grad=True)
    ids = torch.zeros(100, 1000, dtype=torch.int64)
    cotangent = 1 + 0.01 * torch.randn(100, 1000, 16)
    (got,) = cases.gradients(ops.gather_tokens(table, ids), [table], cotangent)
    cases.close(got[0], cotangent.double().sum((0, 1)), scale=1.0)
    assert torch.equal(got[1], torch.zeros(16))
    mask_token = torch.zeros(16, requires_grad=True)
    out = ops.restore_tokens(torch.zeros(100, 0, 16), torch.zeros(100, 0, dtype=torch.int64), mask_token, length=1000)
    cases.close(cases.gradients(out, [mask_token], cotangent)[0], cotangent.double().sum((0, 1)), scale=1.0)


# restore_tokens


@quick
@given(st.sampled_from([1, 2, 33, 65]), st.integers(1, 7), st.sampled_from([1, 16, 31]), st.integers(0, 2), st.data())
def test_restore_tokens(batch: int, length: int, dim: int, prefix: int, data: Any) -> None:
    """Against MAE's cat and gather, and values by hand; mixed dtypes, with and without positions and prefix."""
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    count = data.draw(st.integers(0, length))
    dtypes = [data.draw(st.sampled_from(FLOATS)) for _ in range(3)]
    ids = cases.distinct_ids(batch, count, length)
    with_position = data.draw(st.booleans())
    visible = torch.randn(batch, prefix + count, dim).to(dtypes[0])
    x = [visible, torch.randn(1, 1, dim).to(dtypes[1]), torch.randn(prefix + length, dim).to(dtypes[2])]
    x = [leaf.requires_grad_() for leaf in (x if with_position else x[:2])]
    position = x[2] if with_position else None
    got = ops.restore_tokens(x[0], ids, x[1], position, None if with_position else length, num_prefix_tokens=prefix)
    exact = [leaf.detach().double().requires_grad_() for leaf in x]
    rows = []
    for b in range(batch):
        row = [exact[0][b, i] for i in range(prefix)] + [exact[1].flatten()] * length
        for k, place in enumerate(ids[b].tolist()):
            row[prefix + place] = exact[0][b, prefix + k]
        rows.append(torch.stack(row))
    want = torch.stack(rows) + (exact[2] if with_position else 0)
    expected = torch.result_type(visible, x[1].detach())
    assert got.dtype == (torch.promote_types(expected, dtypes[2]) if with_position else expected)
    cases.close(got, want, scale=1.0)
    cotangent = torch.randn(got.shape).to(got.dtype)
    wanted, sizes = (cases.gradients(want, exact, c) for c in (cotangent, cotangent.abs()))
    for leaf, g, w, size in zip(x, cases.gradients(got, x, cotangent), wanted, sizes):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        # what goes back to a wider dtype was rounded in that of the result
        cases.close(g.to(got.dtype) if torch.finfo(got.dtype).eps > torch.finfo(g.dtype).eps else g, w, size)


def test_mae_decoder_input() -> None:
    noise = torch.rand(3, 9)
    shuffle = noise.argsort(1)
    x, token, position = torch.randn(3, 5, 8), torch.randn(1, 1, 8), torch.randn(1, 10, 8)
    want = cases.mae_decoder_input(x, shuffle.argsort(1), token, position)
    torch.testing.assert_close(ops.restore_tokens(x, shuffle[:, :4], token, position, num_prefix_tokens=1), want)


# masked_patch_loss


@quick
@given(problems(), st.sampled_from((*FLOATS, U8)), st.sampled_from(FLOATS), st.data())
def test_masked_patch_loss(x: dict, dtype: torch.dtype, pred_dtype: torch.dtype, data: Any) -> None:
    """All options, rows by id and by patch, against the definition in float64; error against that of eager."""
    images = cases.images_of(*x["shape"], dtype, x["layout"])
    batch, channels, _ = x["shape"]
    count = data.draw(st.integers(1, x["length"]))
    ids = cases.distinct_ids(batch, count, x["length"])
    rows = data.draw(st.sampled_from([count, x["length"]]))
    values = channels
    for p in x["patch"]:
        values *= p
    stats = {"mean": [0.4] * channels, "std": [0.2] * channels} if data.draw(st.booleans()) else {}
    # a variance of one value is 0/0, as in PyTorch
    choices = [None, "patch"] if values > 1 else [None]
    normalize = data.draw(st.sampled_from([*choices, "channel"] if values > channels else choices))
    options = {
        "normalize": normalize,
        "eps": 1e-3,  # not so small that a rounded pixel moves a faint patch
        "loss": data.draw(st.sampled_from(["l1", "l2"])),
        "channels_last": x["channels_last"],
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        **stats,
    }
    pred = (
        torch.randn(batch, rows, 2 * values)[..., ::2] if data.draw(st.booleans()) else torch.randn(batch, rows, values)
    )
    pred = pred.to(pred_dtype).requires_grad_()
    got = ops.masked_patch_loss(pred, images, ids, x["patch"], **options)
    exact = pred.detach().double().requires_grad_()
    pixels = images if dtype == U8 else images.double()
    want = reference.masked_patch_loss(
        exact, pixels.double() / 255 if dtype == U8 else pixels, ids, x["patch"], **options
    )
    assert got.dtype == (F64 if F64 in (dtype, pred_dtype) else F32)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=200 * eps, atol=200 * eps * (want.numel() and count * batch))
    cotangent = torch.rand(got.shape) + 0.5
    (gradient,) = cases.gradients(got, [pred], cotangent)
    (wanted,) = cases.gradients(want, [exact], cotangent)
    assert gradient.dtype == pred_dtype
    if options["loss"] == "l2":
        limit = 2 * torch.finfo(pred_dtype).eps + 200 * eps
        assert (gradient.double() - wanted).norm() <= limit * wanted.norm() + torch.finfo(pred_dtype).smallest_normal
    else:  # a sign may turn where pred is the target but for a rounding
        differ = ((gradient.double() - wanted).abs() > 0.01 * wanted.abs()).double().mean()
        assert differ < 0.02


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", ["all", "hidden"])
def test_mae(norm: bool, rows: str) -> None:
    pred, images = torch.randn(3, 6, 48, dtype=F64), torch.rand(3, 3, 8, 12, dtype=F64)
    ids = cases.distinct_ids(3, 4, 6)
    mask = torch.zeros(3, 6, dtype=F64).scatter_(1, ids, 1.0)
    own = pred if rows == "all" else ops.gather_tokens(pred, ids)
    got = ops.masked_patch_loss(own, images, ids, 4, normalize="patch" if norm else None)
    torch.testing.assert_close(got, cases.mae_loss(pred, images, mask, 4, norm))


def test_videomae() -> None:
    """The clips come normalised; the loss gives its pixels back the units that the targets are defined in."""
    mean, std = torch.tensor([0.4, 0.5, 0.6], dtype=F64), torch.tensor([0.2, 0.3, 0.25], dtype=F64)
    clips, ids = torch.randn(2, 3, 4, 8, 8, dtype=F64), cases.distinct_ids(2, 5, 8)
    pred = torch.randn(2, 5, 3 * 2 * 4 * 4, dtype=F64)
    # (x - m) / s with m = -mean / std, s = 1 / std is x * std + mean
    got = ops.masked_patch_loss(
        pred, clips, ids, (2, 4, 4), normalize="channel", mean=-mean / std, std=1 / std, reduction="mean"
    )
    torch.testing.assert_close(got, cases.videomae_loss(pred, clips, ids, (2, 4, 4), mean, std))


def test_simmim() -> None:
    images, output = torch.randn(2, 3, 8, 8, dtype=F64), torch.randn(2, 3, 8, 8, dtype=F64)
    mask = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]], dtype=F64)
    ids = torch.tensor([[0, 3], [1, 2]])
    pred = ops.gather_patches(output, ids, 4, channels_last=True)
    got = ops.masked_patch_loss(pred, images, ids, 4, loss="l1")
    torch.testing.assert_close(got, cases.simmim_loss(output, images, mask, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalize", ["patch", "channel"])
def test_a_constant_patch(normalize: str) -> None:
    """Its target is zero exactly, whatever the constant: the loss is the mean square of pred."""
    pred = torch.randn(1, 1, 768)
    for value in (0.0, 0.1, 1e-20, 1e20, 254 / 255):
        got = ops.masked_patch_loss(pred, torch.full((1, 3, 16, 16), value), torch.tensor([0]), 16, normalize=normalize)
        torch.testing.assert_close(got.double(), pred.double().square().mean(), rtol=1e-6, atol=0)


def test_a_faint_patch_keeps_its_digits() -> None:
    """Contrast 1e-3 on a level of 100: the textbook E[x^2] - E[x]^2 has no digit left."""
    images = 100 + 1e-3 * torch.randn(1, 3, 16, 16)
    pred, ids = torch.randn(1, 1, 768), torch.tensor([0])
    got = ops.masked_patch_loss(pred, images, ids, 16, normalize="patch", eps=1e-12)
    exact = reference.masked_patch_loss(pred.double(), images.double(), ids, 16, normalize="patch", eps=1e-12)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_pixel_spoils_its_patch_alone(bad: float) -> None:
    images, ids = torch.rand(2, 3, 8, 8), cases.distinct_ids(2, 3, 4)
    images[1, 2, 0, 7] = bad  # in patch 1
    for normalize in (None, "patch", "channel"):
        rows = ops.masked_patch_loss(torch.zeros(2, 3, 48), images, ids, 4, normalize=normalize, reduction="none")
        spoilt = torch.zeros(2, 3, dtype=torch.bool)
        spoilt[1] = ids[1] == 1
        assert torch.equal(~rows.isfinite(), spoilt)


# permute_patches


@quick
@given(problems(), st.sampled_from((*FLOATS, U8)))
def test_permute_patches(x: dict, dtype: torch.dtype) -> None:
    images = cases.images_of(*x["shape"], dtype, x["layout"])
    ids = cases.distinct_ids(x["shape"][0], x["length"], x["length"])
    got = ops.permute_patches(images, ids, x["patch"])
    assert (got.dtype, got.shape) == (dtype, images.shape) and got.is_contiguous()
    before, after = cases.cut(images, x["patch"], False), cases.cut(got, x["patch"], False)
    assert torch.equal(after, before.gather(1, ids[..., None].expand(-1, -1, before.shape[2])))
    assert torch.equal(ops.permute_patches(got, ids.argsort(1), x["patch"]), images)


# every op


def test_same_bits_again_and_with_other_threads(threads: int) -> None:
    """A row has one owner and sums have one order, so that two threads give the bits of one."""
    torch.manual_seed(1)
    images, pred = torch.rand(16, 3, 64, 64), torch.randn(16, 11, 768, requires_grad=True)
    visible, token = torch.randn(16, 6, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    position = torch.randn(17, 256, requires_grad=True)
    hidden, repeats = cases.distinct_ids(16, 11, 16), torch.randint(16, (16, 40))

    def everything() -> list[Tensor]:
        loss = ops.masked_patch_loss(pred, images, hidden, 16, normalize="patch")
        restored = ops.restore_tokens(visible, hidden[:, :5], token, position, num_prefix_tokens=1)
        rows = ops.gather_tokens(position, repeats)
        total = (restored**2).sum() + (rows**3).sum() + loss
        return [loss.detach(), restored.detach(), *torch.autograd.grad(total, [pred, visible, position])]

    first, second = everything(), everything()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = everything()
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, alone))


def test_empty() -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    assert ops.gather_patches(torch.empty(0, 3, 8, 8), none, 4).shape == (0, 2, 48)
    assert ops.gather_patches(torch.rand(2, 3, 8, 8), torch.empty(2, 0, dtype=torch.int64), 4).shape == (2, 0, 48)
    assert ops.gather_tokens(torch.empty(0, 4, 5), none).shape == (0, 2, 5)
    assert ops.restore_tokens(torch.empty(0, 2, 5), none, torch.zeros(5), length=4).shape == (0, 4, 5)
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    ops.gather_patches(x, torch.empty(2, 0, dtype=torch.int64), 4).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert ops.permute_patches(torch.empty(0, 3, 8, 8), torch.arange(4), 4).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("form", ["bias and position", "position", "bias", "neither"])
@pytest.mark.parametrize("every", [True, False])
def test_embed_patches_is_the_convolution_gathered(form: str, every: bool) -> None:
    conv = torch.nn.Conv2d(3, 7, 4, 4).double()
    position = torch.randn(6, 7, dtype=F64, requires_grad=True)
    images = torch.rand(2, 3, 8, 12, dtype=F64, requires_grad=True)
    ids = None if every else cases.distinct_ids(2, 4, 6)
    bias = conv.bias if "bias" in form else None
    given = [x for x in (images, conv.weight, bias, position if "position" in form else None) if x is not None]
    got = ops.embed_patches(images, ids, conv.weight, bias, position if "position" in form else None, 4)
    want = torch.nn.functional.conv2d(images, conv.weight, bias, 4).flatten(2).mT
    want = want + position if "position" in form else want
    want = want if every else want.gather(1, ids[..., None].expand(-1, -1, 7))
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(got)
    for a, b in zip(cases.gradients(got, given, cotangent), cases.gradients(want, given, cotangent)):
        torch.testing.assert_close(a, b)
