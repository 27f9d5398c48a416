# SPDX-License-Identifier: Apache-2.0
"""The patch ops in autograd and under the compiler: gradcheck, opcheck, double backward, graphs, fakes, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches_cases as cases
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from sslkernels import ops
from sslkernels.reference import patches as reference

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
IMAGES, PRED, VISIBLE, TOKEN, TABLE = (2, 3, 4, 6), (2, 4, 12), (2, 3, 5), (1, 1, 5), (7, 5)
WEIGHT = (5, 3, 2, 2)
# name -> the op on differentiable tensors and ids, the shapes of the tensors; 6 patches of 2 x 2
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "gather_patches": (lambda ids, x: ops.gather_patches(x, ids, 2, channels_last=True), (IMAGES,)),
    "gather_patches all": (lambda ids, x: ops.gather_patches(x, None, 2), (IMAGES,)),
    "gather_patches repeats": (lambda ids, x: ops.gather_patches(x, ids[:, [0, 0, 1]], (2, 2)), (IMAGES,)),
    "gather_patches std": (
        lambda ids, x: ops.gather_patches(x, ids, 2, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 0.5]),
        (IMAGES,),
    ),
    "embed_patches": (lambda ids, x, w, b, t: ops.embed_patches(x, ids, w, b, t[1:], 2), (IMAGES, WEIGHT, (5,), TABLE)),
    "gather_tokens": (lambda ids, t: ops.gather_tokens(t, ids[:, None].expand(2, 3, 4)), ((2, 6, 5),)),
    "gather_tokens table": (lambda ids, t: ops.gather_tokens(t, ids), (TABLE,)),
    "restore_tokens": (
        lambda ids, v, m, t: ops.restore_tokens(v, ids[:, :2], m, t, num_prefix_tokens=1),
        (VISIBLE, TOKEN, TABLE),
    ),
    "restore_tokens length": (lambda ids, v, m: ops.restore_tokens(v, ids[:, :3], m, length=6), (VISIBLE, TOKEN)),
    **{
        f"masked_patch_loss {reduction} {normalize}": (
            lambda ids, p, reduction=reduction, normalize=normalize: ops.masked_patch_loss(
                p, PIXELS, ids, 2, normalize=normalize, reduction=reduction
            ),
            (PRED,),
        )
        for reduction, normalize in (("mean", "patch"), ("sum", "channel"), ("none", "patch"), ("none", None))
    },
    "masked_patch_loss l1 all": (
        lambda ids, p: ops.masked_patch_loss(p, PIXELS, ids, 2, loss="l1", reduction="none"),
        ((2, 6, 12),),
    ),
    "permute_patches": (lambda ids, x: ops.permute_patches(x, ids.argsort(1).argsort(1), 2), (IMAGES,)),
}
PIXELS = torch.rand(IMAGES, generator=torch.Generator().manual_seed(3), dtype=F64)


def ids_of(name: str) -> Tensor:
    return cases.distinct_ids(2, 6 if name == "permute_patches" else 4, 6)


def tensors_of(name: str, dtype: torch.dtype = F64, grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in CALLS[name][1]]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str) -> None:
    ids = ids_of(name)
    assert torch.autograd.gradcheck(lambda *x: CALLS[name][0](ids, *x), tensors_of(name))


@pytest.mark.parametrize("name", CALLS)
def test_each_gradient_alone(name: str) -> None:
    """What nobody asks for is not computed, and what somebody asks for is the same without it."""
    ids, leaves = ids_of(name), tensors_of(name)
    out = CALLS[name][0](ids, *leaves)
    cotangent = torch.randn_like(out)
    together = cases.gradients(out, leaves, cotangent)
    for i, gradient in enumerate(together):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        torch.testing.assert_close(cases.gradients(CALLS[name][0](ids, *alone), [alone[i]], cotangent)[0], gradient)
    with torch.no_grad():
        assert torch.equal(CALLS[name][0](ids, *leaves), out)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "permute_patches"])
def test_double_backward_is_refused_by_name(name: str) -> None:
    ids = ids_of(name)
    for i in range(len(CALLS[name][1])):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors_of(name))]
        out = CALLS[name][0](ids, *leaves)
        (gradient,) = torch.autograd.grad((out**2).sum(), leaves[i], create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"sslkernels::\w+: double backward is not supported; use sslkernels.ref"
        ):
            (gradient**2).sum().backward()


def test_a_permutation_is_differentiable_twice() -> None:
    x, ids = torch.randn(IMAGES, dtype=F64, requires_grad=True), torch.randperm(6)
    assert torch.autograd.gradgradcheck(lambda x: ops.permute_patches(x, ids, 2) ** 2, x)


LOSS_OPTIONS = ([1, 2, 2], 1, 1e-3, False, True)
OP_CALLS = {
    "gather_patches": lambda x, ids, p: (x, ids, [1, 2, 2], True, torch.rand(2, 3) + 0.5, F32),
    "gather_patches_backward": lambda x, ids, p: (p, ids, list(IMAGES), [1, 2, 2], False, None, BF16),
    "embed_patches": lambda x, ids, p: (
        *(x.float(), ids, torch.randn(5, 12, requires_grad=True), torch.randn(5), torch.randn(6, 5)),
        *([1, 2, 2], True, None),
    ),
    "embed_patches_backward": lambda x, ids, p: (
        *(torch.randn(2, 4, 5), p.detach().float(), ids, torch.randn(5, 12)),
        *(6, [True, False, True, True]),
    ),
    "gather_tokens": lambda x, ids, p: (torch.randn(2, 6, 5, requires_grad=True), ids),
    "gather_tokens_backward": lambda x, ids, p: (p, ids, 6),
    "restore_tokens": lambda x, ids, p: (p, ids, torch.randn(12, requires_grad=True), torch.randn(6, 12), 6, 0),
    "restore_tokens_backward": lambda x, ids, p: (torch.randn(2, 7, 5), ids, 1, [True, False, True]),
    "masked_patch_loss": lambda x, ids, p: (p, x.detach(), ids, *LOSS_OPTIONS, torch.rand(2, 3) + 0.5, 1, True),
    "masked_patch_loss rows": lambda x, ids, p: (p, x.detach(), ids, *LOSS_OPTIONS, None, 0, False),
    "masked_patch_loss_backward": lambda x, ids, p: (torch.rand(2, 4), p, x.detach(), ids, *LOSS_OPTIONS, None),
    "permute_patches": lambda x, ids, p: (x, torch.randperm(6).expand(2, 6), [1, 2, 2], True),
}


@pytest.mark.parametrize("name", OP_CALLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    images = torch.rand(IMAGES).to(dtype).requires_grad_()
    pred = torch.randn(PRED).to(dtype).requires_grad_("backward" not in name)
    args = OP_CALLS[name](images, cases.distinct_ids(2, 4, 6), pred)
    torch.library.opcheck(getattr(torch.ops.sslkernels, name.split()[0]).default, args)


@pytest.mark.parametrize("name", OP_CALLS)
def test_the_fallback_is_the_kernel(name: str) -> None:
    """What serves other devices, called as the dispatcher calls it: same shapes, dtypes, strides and numbers."""
    for dtype in (F32, F64, BF16):
        images, pred = torch.rand(IMAGES).to(dtype), torch.randn(PRED).to(dtype)
        args = list(OP_CALLS[name](images, cases.distinct_ids(2, 4, 6), pred))
        args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        if dtype == F64:
            args = [x.double() if isinstance(x, Tensor) and x.shape == (2, 3) else x for x in args]
        from sslkernels.reference import _patches

        op = name.split()[0]
        got = getattr(torch.ops.sslkernels, op)(*args)
        want = getattr(_patches, op)(*args)
        for a, b in zip((got,) if isinstance(got, Tensor) else got, (want,) if isinstance(want, Tensor) else want):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_with_its_backward(name: str) -> None:
    ids, leaves = ids_of(name), tensors_of(name)
    compiled = torch.compile(CALLS[name][0], fullgraph=True, backend="aot_eager")
    got, want = compiled(ids, *leaves), CALLS[name][0](ids, *leaves)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    torch.testing.assert_close(cases.gradients(got, leaves, cotangent), cases.gradients(want, leaves, cotangent))


def step(images: Tensor, ids: Tensor, hidden: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """A masked autoencoder without its transformers."""
    x = ops.embed_patches(images, ids, weight, None, position, 2)
    x = ops.restore_tokens(x, ids, token, position)
    return ops.masked_patch_loss(x, images, hidden, 2, normalize="patch", eps=1e-3)


def step_inputs(batch: int, dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    order = cases.distinct_ids(batch, 6, 6)
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((12, 3, 2, 2), (12,), (6, 12))]
    return torch.rand(batch, 3, 4, 6, dtype=dtype), order[:, :2], order[:, 2:], *leaves


def test_other_batch_sizes_do_not_compile_again() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for batch in (5, 9, 7):  # a size that another axis has would be taken for that axis
        x = step_inputs(batch)
        got, want = compiled(*x), step(*x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x[3:]), torch.autograd.grad(want, x[3:]))
    assert counter.frame_count == 1


def test_inductor() -> None:
    pred, ids = torch.randn(PRED, requires_grad=True), cases.distinct_ids(2, 4, 6)

    def halved(pred: Tensor, ids: Tensor) -> Tensor:
        return ops.masked_patch_loss(0.5 * pred, PIXELS, ids, 2, normalize="patch")

    got, want = torch.compile(halved, fullgraph=True)(pred, ids), halved(pred, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, pred), torch.autograd.grad(want, pred))


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return step(*x)

    batch = torch.export.Dim("batch", min=2, max=4096)
    sizes = ({0: batch}, {0: batch}, {0: batch}, None, None, None)
    program = torch.export.export(Model(), step_inputs(3), dynamic_shapes=(sizes,))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.sslkernels.masked_patch_loss.default in calls
    for size in (3, 8):
        x = step_inputs(size)
        torch.testing.assert_close(program.module()(*x), step(*x))


@pytest.mark.parametrize("name", [name for name in CALLS if "loss" not in name])  # whose images are real here
def test_meta_tensors(name: str) -> None:
    ids, leaves = ids_of(name), tensors_of(name, grad=False)
    want = CALLS[name][0](ids, *leaves)
    got = CALLS[name][0](ids.to("meta"), *(x.to("meta") for x in leaves))
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_large_fakes() -> None:
    """More elements than 32 bits count, forward and backward, without any of them."""
    with torch._subclasses.FakeTensorMode():
        images = torch.empty(2**14, 3, 224, 224)
        ids = torch.empty(2**14, 147, dtype=torch.int64)
        pred = torch.empty(2**14, 196, 768, requires_grad=True)
        ops.masked_patch_loss(pred, images, ids, 16, normalize="patch").backward()
        assert pred.grad.shape == pred.shape
        assert ops.gather_patches(images, ids, 16).shape == (2**14, 147, 768)


def test_autocast() -> None:
    """The product of the embedding is taken in bfloat16; restored tokens and losses stay float32."""
    images, ids, hidden, *leaves = step_inputs(3)
    weight, token, position = leaves
    with torch.autocast("cpu", BF16):
        x = ops.embed_patches(images, ids, weight, None, None, 2)
        embedded = ops.embed_patches(images, ids, weight, None, position, 2)
        restored = ops.restore_tokens(x, ids, token, position)
        loss = ops.masked_patch_loss(x, images, hidden[:, :2], 2)
    assert (x.dtype, embedded.dtype, restored.dtype, loss.dtype) == (BF16, F32, F32, F32)
    want = reference.gather_patches(images, ids, 2) @ weight.flatten(1).T
    torch.testing.assert_close(x.float(), want, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert weight.grad.dtype == F32 and weight.grad.isfinite().all()


def test_small_gradients_survive_16_bits() -> None:
    """A mean over 2^20 values: each gradient is below the least float16, until the scaler multiplies it."""
    pred = torch.randn(16, 8, 8192).half().requires_grad_()
    images = torch.zeros(16, 2, 128, 256)
    loss = ops.masked_patch_loss(pred, images, torch.arange(8), (64, 64))
    (gradient,) = torch.autograd.grad(loss * 2.0**20, pred)
    torch.testing.assert_close(gradient, 2 * pred.detach(), rtol=2e-3, atol=1e-4)


def test_images_and_targets_take_no_gradient_from_the_loss() -> None:
    images, pred = torch.rand(IMAGES, requires_grad=True), torch.randn(PRED, requires_grad=True)
    ops.masked_patch_loss(pred, images, torch.arange(4), 2).backward()
    assert images.grad is None and pred.grad is not None


def test_pred_that_changes_after_the_loss_is_noticed() -> None:
    pred = torch.randn(PRED, requires_grad=True)
    x = pred * 1
    loss: Any = ops.masked_patch_loss(x, torch.rand(IMAGES), torch.arange(4), 2, reduction="none").sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
