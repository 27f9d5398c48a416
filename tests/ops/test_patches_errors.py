# SPDX-License-Identifier: Apache-2.0
"""Bad input to the patch ops: a ValueError or TypeError that names the argument, on fakes too; NaN if nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches_cases as cases
import pytest
import torch
from torch import Tensor

from sslkernels import check_values, ops
from sslkernels.reference import _patches
from sslkernels.reference import patches as reference

IMAGES, CLIPS = torch.rand(2, 3, 8, 12), torch.rand(2, 3, 4, 8, 12)
IDS = torch.tensor([[0, 3, 5], [1, 2, 4]])
PRED, TOKENS, VISIBLE = torch.randn(2, 3, 48), torch.randn(2, 6, 5), torch.randn(2, 4, 5)
TOKEN, POSITION = torch.randn(5), torch.randn(7, 5)


def gather(images: Any = IMAGES, ids: Any = IDS, patch: Any = 4, **k: Any) -> Tensor:
    return ops.gather_patches(images, ids, patch, **k)


def embed(weight: Any = torch.randn(7, 3, 4, 4), bias: Any = None, position: Any = None, **k: Any) -> Tensor:  # noqa: B008
    return ops.embed_patches(IMAGES, IDS, weight, bias, position, 4, **k)


def restore(visible: Any = VISIBLE, ids: Any = IDS, token: Any = TOKEN, position: Any = POSITION, **k: Any) -> Tensor:
    return ops.restore_tokens(visible, ids, token, position, **{"num_prefix_tokens": 1, **k})


def loss(pred: Any = PRED, images: Any = IMAGES, ids: Any = IDS, patch: Any = 4, **k: Any) -> Tensor:
    return ops.masked_patch_loss(pred, images, ids, patch, **k)


def permute(images: Any = IMAGES, ids: Any = torch.arange(6), patch: Any = 4) -> Tensor:  # noqa: B008
    return ops.permute_patches(images, ids, patch)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no tensor": (lambda: gather([1.0]), TypeError, r"images must be a torch.Tensor, got list"),
    "rank": (lambda: gather(IMAGES[0]), ValueError, r"images must be \(B, C, H, W\) or clips.*\(3, 8, 12\)"),
    "dtype": (lambda: gather(IMAGES.long()), TypeError, r"images must be float32.*uint8, got torch.int64"),
    "patch of a clip": (lambda: gather(CLIPS), ValueError, r"patch_size must be \(t, p, q\) for clips, got 4"),
    "patch of an image": (lambda: gather(patch=(2, 4, 4)), ValueError, r"patch_size must be an int or \(p, q\)"),
    "float patch": (lambda: gather(patch=4.0), ValueError, r"patch_size must be an int or \(p, q\), got 4.0"),
    "no patch": (lambda: gather(patch=0), ValueError, r"patch_size must divide the sides \(8, 12\)"),
    "not divisible": (lambda: gather(patch=5), ValueError, r"patch_size must divide the sides \(8, 12\).*\(5, 5\)"),
    "frames": (lambda: gather(CLIPS, patch=(3, 4, 4)), ValueError, r"patch_size must divide the sides \(4, 8, 12\)"),
    "ids dtype": (lambda: gather(ids=IDS.int()), TypeError, r"ids must be int64, got torch.int32"),
    "ids list": (lambda: gather(ids=[0, 1]), TypeError, r"ids must be a torch.Tensor, got list"),
    "ids batch": (lambda: gather(ids=IDS[:1]), ValueError, r"ids must have shape \(2, K\) or \(K,\), got \(1, 3\)"),
    "ids device": (lambda: gather(ids=IDS.to("meta")), ValueError, r"ids must be on cpu, got meta"),
    "mean alone": (lambda: gather(mean=[0.0] * 3), ValueError, r"mean and std must come together"),
    "mean length": (lambda: gather(mean=[0.0], std=[1.0] * 3), ValueError, r"mean must have one number for each of 3"),
    "mean number": (lambda: gather(mean=0.5, std=0.5), TypeError, r"mean must be a tensor or a sequence.*got float"),
    "std zero": (lambda: gather(mean=[0.0] * 3, std=[1.0, 0.0, 1.0]), ValueError, r"std must be positive"),
    "result dtype": (lambda: gather(dtype=torch.int32), TypeError, r"dtype must be float32.*got torch.int32"),
    "weight": (lambda: embed(torch.randn(7, 3, 4, 5)), ValueError, r"weight must have 48 values.*\(7, 3, 4, 5\)"),
    "bias": (lambda: embed(bias=torch.randn(6)), ValueError, r"bias must have shape \(7,\), got \(6,\)"),
    "embedding position": (
        lambda: embed(position=torch.randn(7, 7)),
        ValueError,
        r"position must have shape \(6, 7\), got \(7, 7\)",
    ),
    "tokens": (lambda: ops.gather_tokens(TOKENS.long(), IDS), ValueError, r"tokens must be floating \(B, L, D\)"),
    "tokens batch": (lambda: ops.gather_tokens(TOKENS, IDS[:1]), ValueError, r"ids must have shape \(2, K\) or \(2, M"),
    "tokens ids": (lambda: ops.gather_tokens(TOKENS, IDS[0]), ValueError, r"ids must have shape \(2, K\).*\(3,\)"),
    "visible": (lambda: restore(VISIBLE[0]), ValueError, r"visible must be floating \(B, P \+ K, D\)"),
    "visible count": (lambda: restore(VISIBLE[:, :3]), ValueError, r"ids must have shape \(2, 2\), got \(2, 3\)"),
    "mask token": (lambda: restore(token=torch.randn(4)), ValueError, r"mask_token must hold 5 floating elements"),
    "position": (lambda: restore(position=torch.randn(7, 4)), ValueError, r"position must have shape \(1 \+ L, 5\)"),
    "prefix": (lambda: restore(num_prefix_tokens=5), ValueError, r"num_prefix_tokens must be in \[0, 4\], got 5"),
    "length": (lambda: restore(position=None), ValueError, r"length must be given where position is not"),
    "lengths": (lambda: restore(length=7), ValueError, r"length must be 6, as position has it, got 7"),
    "pred rows": (lambda: loss(PRED[:, :2]), ValueError, r"pred must have shape \(2, 3 or 6, 48\), got \(2, 2, 48\)"),
    "pred values": (lambda: loss(PRED[..., 1:]), ValueError, r"pred must have shape \(2, 3 or 6, 48\)"),
    "pred dtype": (lambda: loss(PRED.long()), TypeError, r"pred must be float32.*got torch.int64"),
    "no ids": (lambda: loss(ids=IDS[:, :0], pred=PRED[:, :0]), ValueError, r"ids must name at least one patch"),
    "normalize": (lambda: loss(normalize="image"), ValueError, r"normalize must be None, 'patch' or 'channel'"),
    "loss": (lambda: loss(loss="l3"), ValueError, r"loss must be one of 'l2', 'l1', got 'l3'"),
    "reduction": (lambda: loss(reduction="max"), ValueError, r"reduction must be one of 'none', 'mean', 'sum'"),
    "eps": (lambda: loss(eps=-1.0), ValueError, r"eps must be in \[0.0, inf\), got -1.0"),
    "permutation": (lambda: permute(ids=torch.arange(5)), ValueError, r"ids must be a permutation of 6 patches"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_refused_on_fakes() -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(ValueError, match="patch_size must divide"):
            gather(torch.empty(2, 3, 8, 12), torch.zeros(2, 3, dtype=torch.int64), 5)
        with pytest.raises(ValueError, match="pred must have shape"):
            loss(torch.empty(2, 2, 48), torch.empty(2, 3, 8, 12), torch.zeros(2, 3, dtype=torch.int64))


WITH_IDS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gather_patches": (lambda ids: gather(ids=ids), False),
    "gather_tokens": (lambda ids: ops.gather_tokens(TOKENS, ids), False),
    "gather_tokens table": (lambda ids: ops.gather_tokens(TOKENS[0], ids), False),
    "embed_patches": (
        lambda ids: ops.embed_patches(IMAGES, ids, torch.randn(7, 48), None, torch.randn(6, 7), 4),
        False,
    ),
    "restore_tokens": (lambda ids: restore(ids=ids), True),
    "masked_patch_loss": (lambda ids: loss(ids=ids), True),
    "masked_patch_loss none": (lambda ids: loss(ids=ids, reduction="none"), True),
    "permute_patches": (lambda ids: permute(IMAGES[..., :4], ids, (4, 4) if ids.shape[1] == 2 else (8, 4)), True),
}


@pytest.mark.parametrize("name", [name for name in WITH_IDS if name != "permute_patches"])
@pytest.mark.parametrize("bad", [-1, 6, 2**40, -(2**62)])
def test_ids_outside(name: str, bad: int) -> None:
    ids = IDS.clone()
    ids[1, 2] = bad
    with pytest.raises(ValueError, match=rf"ids must be in \[0, 6\), got {bad}"):
        WITH_IDS[name][0](ids)


@pytest.mark.parametrize("name", [name for name, (_, distinct) in WITH_IDS.items() if distinct])
def test_repeated_ids(name: str) -> None:
    """Of one sample; the same id in two samples is fine."""
    ids = torch.tensor([[0, 1], [1, 1]]) if name == "permute_patches" else torch.tensor([[0, 3, 5], [1, 2, 1]])
    with pytest.raises(ValueError, match="ids must not repeat within a sample, got 1 more than once"):
        WITH_IDS[name][0](ids)


def test_compiled_ids_are_checked_when_it_runs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: gather(ids=ids), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), gather())
    with pytest.raises(RuntimeError, match=r"ids must be in \[0, 6\), got 6"):
        compiled(IDS + 1)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose values nobody reads."""
    monkeypatch.setattr("sslkernels._checks.readable", lambda x: check_values.enabled)


BAD_IDS = torch.tensor([[0, -1, 2], [3, 9, 2**40]])


def test_unread_ids_spoil_only_what_they_name(unread: None) -> None:
    """The reference serves other devices: it neither raises nor reads outside, and NaN tells."""
    good = torch.tensor([[True, False, True], [True, False, False]])
    for rows in (
        _patches.gather_patches(IMAGES, BAD_IDS, [1, 4, 4], False, None, torch.float32),
        _patches.gather_tokens(TOKENS, BAD_IDS),
    ):
        assert torch.equal(rows.isnan().any(-1), ~good) and torch.equal(rows.isnan().all(-1), ~good)
    for mode in (0, 1, 2):
        options = ([1, 4, 4], mode, 1e-6, False, True, None)
        row, _ = _patches.masked_patch_loss(PRED, IMAGES, BAD_IDS, *options, 0, False)
        assert torch.equal(row.isnan(), ~good)
        total, grad = _patches.masked_patch_loss(PRED, IMAGES, BAD_IDS, *options, 1, True)
        assert total.isnan() and torch.equal(grad.isnan().any(-1), ~good)
    out = _patches.restore_tokens(VISIBLE, torch.tensor([[0, 3, 5], [1, 2, 1]]), TOKEN, POSITION, 6, 1)
    assert not out[0].isnan().any() and out[1].isnan().all()
    moved = _patches.permute_patches(IMAGES, torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 5]]), [1, 4, 4], False)
    assert torch.equal(moved[0], IMAGES[0]) and moved[1].isnan().all()


def test_unread_ids_in_backward_write_nowhere(unread: None) -> None:
    grad = torch.ones(2, 3, 48)
    image = _patches.gather_patches_backward(grad, BAD_IDS, [2, 3, 8, 12], [1, 4, 4], False, None, torch.float32)
    assert image.sum() == 3 * 48
    assert _patches.gather_tokens_backward(torch.ones(2, 3, 5), BAD_IDS, 6).sum() == 3 * 5
    visible, token, position = _patches.restore_tokens_backward(torch.ones(2, 7, 5), BAD_IDS, 1, [True] * 3)
    assert visible.isfinite().all() and token.isfinite().all() and (position == 2).all()


def test_check_values_reads_them(unread: None) -> None:
    with check_values(), pytest.raises(ValueError, match=r"ids must be in \[0, 6\), got -1"):
        _patches.gather_tokens(TOKENS, BAD_IDS)


def test_the_reference_names_no_patch_outside() -> None:
    """Called directly it is the definition: NaN on any device."""
    assert torch.equal(reference.gather_patches(IMAGES, BAD_IDS, 4).isnan().all(-1), ~((BAD_IDS >= 0) & (BAD_IDS < 6)))
    assert cases.cut(IMAGES, (4, 4), False).shape == (2, 6, 48)
