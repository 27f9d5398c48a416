# SPDX-License-Identifier: Apache-2.0
"""What the losses refuse: by name, with what was expected and what came; and shapes that no memory would hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels import losses
from sslkernels.losses import MemoryQueue

A, B = torch.randn(4, 3), torch.randn(4, 3)
Y = torch.tensor([0, 0, 1, 1])
TWO_SETS = {
    "nt_xent": (losses.nt_xent, "out0", "out1"),
    "dcl": (losses.dcl, "out0", "out1"),
    "info_nce": (losses.info_nce, "query", "positive_key"),
    "clip": (lambda a, b, **o: losses.clip_loss(a, b, 1.0, **o), "image_features", "text_features"),
    "siglip": (lambda a, b, **o: losses.siglip_loss(a, b, 1.0, 0.0, **o), "image_features", "text_features"),
}
TEMPERED = {
    "nt_xent": lambda t: losses.nt_xent(A, B, t),
    "dcl": lambda t: losses.dcl(A, B, t),
    "info_nce": lambda t: losses.info_nce(A, B, None, t),
    "supcon": lambda t: losses.supcon(A, Y, t),
}


@pytest.mark.parametrize("name", TWO_SETS)
def test_bad_features(name: str) -> None:
    loss, first, second = TWO_SETS[name]
    with pytest.raises(ValueError, match=rf"{first} must be 2-D .*\(4,\)"):
        loss(A[:, 0], B)
    with pytest.raises(ValueError, match=rf"{second} must be 2-D .*\(1, 4, 3\)"):
        loss(A, B[None])
    with pytest.raises(ValueError, match=rf"{second} must have as many features as {first} \(3\), got shape \(4, 2\)"):
        loss(A, B[:, :2])
    with pytest.raises(ValueError, match=rf"{second} must have the shape of {first} \(4, 3\), got \(3, 3\)"):
        loss(A, B[:3])
    with pytest.raises(ValueError, match=rf"{first} must not be an empty batch, got shape \(0, 3\)"):
        loss(A[:0], B[:0])
    with pytest.raises(TypeError, match=rf"{first} must have a floating dtype, got torch.int64"):
        loss(A.long(), B)
    with pytest.raises(TypeError, match=rf"{second} must be float32.* got torch.float8_e5m2"):
        loss(A, B.to(torch.float8_e5m2))
    with pytest.raises(ValueError, match=rf"{second} must be on the device of {first} \(cpu\), got meta"):
        loss(A, B.to("meta"))
    with pytest.raises(TypeError, match=rf"{first} must be a torch.Tensor, got ndarray"):
        loss(A.numpy(), B)


@pytest.mark.parametrize("name", [*TWO_SETS, "supcon"])
def test_bad_weights_and_options(name: str) -> None:
    def call(**options: Any) -> None:
        losses.supcon(A, Y, **options) if name == "supcon" else TWO_SETS[name][0](A, B, **options)

    with pytest.raises(ValueError, match=r"sample_weight must have shape \(4,\), got \(3,\)"):
        call(sample_weight=torch.ones(3))
    with pytest.raises(TypeError, match=r"sample_weight must be one of torch.float32, .* got torch.int64"):
        call(sample_weight=torch.ones(4, dtype=torch.long))
    with pytest.raises(TypeError, match=r"sample_weight must be a torch.Tensor, got list"):
        call(sample_weight=[1.0] * 4)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'batchmean'"):
        call(reduction="batchmean")


@pytest.mark.parametrize("name", TEMPERED)
def test_bad_temperature(name: str) -> None:
    for bad in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be .*, got {bad}"):
            TEMPERED[name](bad)
    with pytest.raises(TypeError, match="temperature must be a number or a tensor of one element, got str"):
        TEMPERED[name]("0.1")
    with pytest.raises(ValueError, match=r"temperature must be a floating tensor of one element, got .*\(2,\)"):
        TEMPERED[name](torch.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: losses.nt_xent(A, B, label_smoothing=1.0),
            ValueError,
            r"label_smoothing must be in \[0.0, 1.0\), got 1",
        ),
        (lambda: losses.nt_xent(A, B, label_smoothing=-0.1), ValueError, "label_smoothing must be in .*, got -0.1"),
        (lambda: losses.nt_xent(A, B, beta=-1.0), ValueError, "beta must be in .*, got -1.0"),
        (lambda: losses.nt_xent(A, B, tau_plus=1.0), ValueError, "tau_plus must be in .*, got 1.0"),
        (
            lambda: losses.nt_xent(A, B, beta=1.0, label_smoothing=0.1),
            ValueError,
            "label_smoothing is not defined with",
        ),
        (lambda: losses.nt_xent(A[:1], B[:1], beta=1.0), ValueError, r"at least two samples .* \(1, 3\)"),
        (lambda: losses.info_nce(A[:1], B[:1], tau_plus=0.1), ValueError, r"at least two samples .* \(1, 3\)"),
        (lambda: losses.dcl(A[:1], B[:1]), ValueError, r"at least two samples.* \(1, 3\)"),
        (lambda: losses.dcl(A, B, weight_fn=lambda a, b: a), ValueError, r"weight_fn must return shape \(4,\), got"),
        (lambda: losses.dcl(A, B, weight_fn=lambda a, b: 1.0), TypeError, "result of weight_fn must be a torch.Tensor"),
        (
            lambda: losses.info_nce(A, B, A[0]),
            ValueError,
            r"negative_keys must be \(M, D\) or \(N, M, D\), got .*\(3,\)",
        ),
        (
            lambda: losses.info_nce(A, B, A[:, :2]),
            ValueError,
            r"negative_keys must have as many features as query \(3\)",
        ),
        (lambda: losses.info_nce(A, B, A[None]), ValueError, r"negative_keys must have as many rows as query \(4\)"),
        (lambda: losses.info_nce(A, B, A[:0]), ValueError, r"negative_keys must not be empty, got shape \(0, 3\)"),
        (lambda: losses.info_nce(A, B, A.long()), TypeError, "negative_keys must have a floating dtype"),
        (lambda: losses.info_nce(A, B, MemoryQueue(8, 5).keys), ValueError, r"as many features as query .*\(8, 5\)"),
        (lambda: losses.info_nce(A, B, MemoryQueue(8, 3)), TypeError, "negative_keys must be a torch.Tensor, got Mem"),
        (lambda: losses.clip_loss(A, B, math.inf), ValueError, "logit_scale must be finite, got inf"),
        (lambda: losses.clip_loss(A, B, torch.ones(2)), ValueError, "logit_scale must be a floating tensor of one"),
        (lambda: losses.clip_loss(A, B, None), TypeError, "logit_scale must be a number .* got NoneType"),
        (lambda: losses.clip_loss(A, B, 1.0, math.nan), ValueError, "logit_bias must be finite, got nan"),
        (lambda: losses.siglip_loss(A, B, math.nan), ValueError, "logit_scale must be finite, got nan"),
        (lambda: losses.siglip_loss(A, B, 1.0, -math.inf), ValueError, "logit_bias must be finite, got -inf"),
        (lambda: losses.siglip_loss(A, B, 1.0, torch.tensor(1)), ValueError, "logit_bias must be a floating tensor"),
        (lambda: losses.supcon(A, Y - 1), ValueError, "labels must not be negative, got -1"),
        (lambda: losses.supcon(A, Y[:3]), ValueError, r"labels must have shape \(4,\), got \(3,\)"),
        (lambda: losses.supcon(A, Y.float()), TypeError, "labels must be one of torch.int64, got torch.float32"),
        (lambda: losses.supcon(A, None), ValueError, r"labels may be None only for views .* \(4, 3\)"),
        (
            lambda: losses.supcon(A[0], Y),
            ValueError,
            r"features must be \(N, D\), or views \(B, V, D\), got shape \(3,\)",
        ),
        (lambda: losses.supcon(A[:0], Y[:0]), ValueError, "features must not be an empty batch"),
        (lambda: losses.supcon(A[:, None][:, :0]), ValueError, r"features must not be an empty batch.* \(4, 0, 3\)"),
        (lambda: losses.supcon(A.long(), Y), TypeError, "features must have a floating dtype"),
        (lambda: losses.mises_fisher_weights(A, B, 0.0), ValueError, "sigma must be positive and finite, got 0.0"),
        (lambda: losses.NTXentLoss(0.0), ValueError, "temperature must be positive and finite, got 0.0"),
        (lambda: losses.NTXentLoss(torch.tensor(0.1)), TypeError, "nn.Parameter to be learned, got a plain tensor"),
        (lambda: losses.NTXentLoss(strategy="star"), ValueError, "strategy must be one of .gather., .ring."),
        (lambda: losses.NTXentLoss(memory_bank_size=-1), ValueError, "memory_bank_size must be .* got -1"),
        (lambda: losses.NTXentLoss(memory_bank_size=(4, 3, 2)), ValueError, r"memory_bank_size .* got \(4, 3, 2\)"),
        (lambda: losses.NTXentLoss(memory_bank_size=(8, 5))(A, B), ValueError, r"as many features as query .*\(8, 5\)"),
        (lambda: losses.NTXentLoss(reduction="max"), ValueError, "reduction must be one of"),
        (lambda: losses.DCLWLoss(sigma=-1.0), ValueError, "sigma must be positive and finite, got -1.0"),
        (lambda: losses.SupConLoss(label_smoothing=2.0), ValueError, "label_smoothing must be in"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.fixture
def dtensor() -> Iterator[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield distribute_tensor(A, init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


def test_a_dtensor_is_refused_with_the_remedy(dtensor: Tensor) -> None:
    for loss, first, second in TWO_SETS.values():
        with pytest.raises(TypeError, match=rf"{first} is a DTensor.*pass {first}.to_local\(\)"):
            loss(dtensor, B)
        with pytest.raises(TypeError, match=rf"{second} is a DTensor"):
            loss(A, dtensor)
    with pytest.raises(TypeError, match="negative_keys is a DTensor"):
        losses.info_nce(A, B, dtensor)
    with pytest.raises(TypeError, match="features is a DTensor"):
        losses.supcon(dtensor, Y)
    with pytest.raises(TypeError, match="keys is a DTensor"):
        MemoryQueue(8, 3)(dtensor)


def test_compiled_negative_labels_give_nan_in_their_rows() -> None:
    rows = torch.compile(losses.supcon, backend="eager", fullgraph=True)(A, Y - 1, reduction="none")
    assert rows.isnan().tolist() == [True, True, False, False]


def test_shapes_on_fakes_beyond_any_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a, b = (torch.empty(2**20, 8, requires_grad=True) for _ in range(2))
        for loss in (losses.nt_xent, losses.info_nce, losses.dcl, lambda x, y: losses.clip_loss(x, y, 2.0)):
            value = loss(a, b)
            value.backward()
            assert value.shape == ()
            assert a.grad.shape == (2**20, 8)
        assert losses.supcon(a, torch.zeros(2**20, dtype=torch.long), reduction="none").shape == (2**20,)
