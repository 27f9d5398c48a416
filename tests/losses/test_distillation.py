# SPDX-License-Identifier: Apache-2.0
"""DINO's, iBOT's and SwAV's losses: as the originals' code, written out in float64, as functions and as modules."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import ops
from sslkernels.losses import DINOLoss, IBOTPatchLoss, SwaVLoss, dino_loss, ibot_patch_loss, swav_loss

F64 = torch.float64
B, V, D = 5, 37, 6


def views(count: int, batch: int = B, dtype: torch.dtype = F64, width: int = V) -> list[Tensor]:
    return [torch.randn(batch, width, dtype=dtype).requires_grad_() for _ in range(count)]


def same(value: Tensor, expected: Tensor, *inputs: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-12)
    if inputs:
        options = {"retain_graph": True, "materialize_grads": True}
        gradients = [torch.autograd.grad(x, inputs, **options) for x in (value, expected)]
        torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-12)


def dino(teacher: list[Tensor], student: list[Tensor], center: Tensor, temp: float, student_temp: float) -> Tensor:
    """main_dino.py: the loop over pairs of views."""
    total, terms = torch.zeros((), dtype=F64), 0
    for i, t in enumerate(teacher):
        q = F.softmax((t.detach() - center) / temp, dim=-1)
        for v, s in enumerate(student):
            if v == i:
                continue
            total = total + torch.sum(-q * F.log_softmax(s / student_temp, dim=-1), dim=-1).mean()
            terms += 1
    return total / terms


def sinkhorn(x: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    """The originals' exponential form."""
    q = torch.exp(x / epsilon).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


# DINO


def test_dino_over_several_steps() -> None:
    """The centre of a step's loss is that from before it; the schedule is linear in epochs, as in DINO and lightly."""
    loss_fn = DINOLoss(V, 0.03, 0.07, 4, 0.2, 0.8).double()
    center = torch.zeros(V, dtype=F64)
    for epoch, temp in ((0, 0.03), (1, 0.03 + 0.04 / 3), (3, 0.07), (9, 0.07)):
        teacher, student = views(2), views(6)
        value = loss_fn(teacher, student, epoch=epoch)
        same(value, dino(teacher, student, center, temp, 0.2), *student)
        center = 0.8 * center + 0.2 * torch.cat(teacher).detach().mean(0)
        torch.testing.assert_close(loss_fn.center, center.view(1, 1, V))
        assert not loss_fn.center.requires_grad
    teacher, student = views(2), views(3)
    same(loss_fn(teacher, student, 0.05), dino(teacher, student, center, 0.05, 0.2))


def test_dino_defaults() -> None:
    loss_fn, teacher, student = DINOLoss(V).double(), views(2), views(4)
    center = torch.zeros(V, dtype=F64)
    same(loss_fn(teacher, student), dino(teacher, student, center, 0.04, 0.1))
    same(dino_loss(teacher, student), dino(teacher, student, center, 0.04, 0.1))
    assert DINOLoss().center.shape == (1, 1, 65536)


def test_dino_values_by_hand() -> None:
    """A teacher sure of prototype 0, students that give it 1/2 and 1/4."""
    teacher = torch.tensor([[[50.0, 0.0, 0.0]], [[50.0, 0.0, 0.0]]])
    student = torch.log(torch.tensor([[[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]], [[0.25, 0.25, 0.5]]]))
    # pairs (t, s): (0, 1), (0, 2), (1, 0), (1, 2)
    expected = (3 * math.log(4) + math.log(2)) / 4
    assert dino_loss(teacher, student, student_temp=1.0).item() == pytest.approx(expected, rel=1e-6)
    centered = dino_loss(teacher, student, torch.tensor([50.0, 0.0, 0.0]), 1.0, 1.0)  # now it is sure of nothing
    thirds = [-sum(math.log(p) for p in row) / 3 for row in ((0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5))]
    assert centered.item() == pytest.approx((thirds[1] + thirds[2] + thirds[0] + thirds[2]) / 4, rel=1e-6)


def test_dinov2_global_and_local_terms() -> None:
    """Its two terms, divided by 2 + 2 * 4 as its meta architecture does, add up to DINO's mean over pairs."""
    teacher, student = views(2), views(6)
    loss = torch.zeros((), dtype=F64)
    for s in student[2:]:
        for t in teacher:
            loss = loss - (F.softmax(t.detach() / 0.07, -1) * F.log_softmax(s / 0.1, -1)).sum(-1).mean() / 10
    reversed_ = torch.cat(teacher[::-1]).detach()
    rows = -(F.softmax(reversed_ / 0.07, -1) * F.log_softmax(torch.cat(student[:2]) / 0.1, -1)).sum(-1)
    same(dino_loss(teacher, student, teacher_temp=0.07), loss + rows.mean() * 2 / 10, *student)


@pytest.mark.parametrize("center_mode", ["mean", "sinkhorn_knopp"])
def test_dino_takes_views_in_any_shape(center_mode: str) -> None:
    teacher, student = views(2), views(5)
    modules = [DINOLoss(V, center_mode=center_mode).double() for _ in range(3)]
    expected = modules[0](teacher, student)
    stacked = modules[1](torch.stack(teacher), torch.stack(student))
    mixed = modules[2]([torch.stack(teacher)], [torch.stack(student[:2]), *student[2:]])
    for module, value in zip(modules[1:], (stacked, mixed)):
        same(value, expected, *student)
        torch.testing.assert_close(module.center, modules[0].center)


def test_dino_with_sinkhorn() -> None:
    """DINOv2's other centring: over the rows of both views; finite where its exp is not."""
    teacher, student = views(2), views(4)
    loss_fn = DINOLoss(V, teacher_temp=0.07, center_mode="sinkhorn_knopp").double()
    q = sinkhorn(torch.cat(teacher).detach(), 0.07).view(2, B, V)
    pairs = [
        -(q[t] * F.log_softmax(s / 0.1, -1)).sum(-1).mean() for t in range(2) for i, s in enumerate(student) if i != t
    ]
    same(loss_fn(teacher, student), torch.stack(pairs).mean(), *student)
    assert not loss_fn.center.any()
    assert sinkhorn(torch.full((2, 3), 4.0), 0.04).isnan().all()
    assert loss_fn([20 * t.float() for t in teacher], student, 0.04).isfinite()


@pytest.mark.parametrize("own", [False, True], ids=["one layer", "a layer of the teacher's own"])
@pytest.mark.parametrize("center_mode", ["mean", "sinkhorn_knopp"])
def test_dino_of_hidden_rows(center_mode: str, own: bool) -> None:
    """With the prototypes given it is the loss of the logits they make, centre and gradients included."""
    weight = torch.randn(V, D, dtype=F64, requires_grad=True)
    teacher_weight = torch.randn(V, D, dtype=F64) if own else None
    teacher, student = views(2, width=D), views(5, width=D)
    hidden, logits = (DINOLoss(V, teacher_temp=0.4, center_mode=center_mode).double() for _ in range(2))
    for _ in range(3):
        other = weight if teacher_weight is None else teacher_weight
        expected = logits([F.linear(t, other) for t in teacher], [F.linear(s, weight) for s in student])
        value = hidden(teacher, student, weight=weight, teacher_weight=teacher_weight)
        same(value, expected, weight, *student)
        torch.testing.assert_close(hidden.center, logits.center)


# iBOT


def masked_tokens(mask: Tensor, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Teacher and student logits of all tokens, (B, L, V)."""
    shape = (mask.shape[0], mask[0].numel(), V)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype, requires_grad=True)


def some_mask() -> Tensor:
    """Images with few and many masked tokens, and one without."""
    mask = torch.rand(6, 4, 5) < 0.3
    mask[0, 0, 0], mask[2] = True, False
    mask[4] = True
    return mask


def ibot(teacher: Tensor, student: Tensor, mask: Tensor, center: Tensor, temp: float, student_temp: float) -> Tensor:
    """main_ibot.py: all tokens, of which those under the mask count."""
    q, m = F.softmax((teacher - center) / temp, dim=-1), mask.flatten(1).double()
    rows = torch.sum(-q * F.log_softmax(student / student_temp, dim=-1), dim=-1)
    return (torch.sum(rows * m, dim=-1) / m.sum(dim=-1).clamp(min=1.0)).mean()


def test_ibot_over_several_steps() -> None:
    """Masked tokens only are given, and only they move the centre: DINOv2 and lightly."""
    loss_fn, center = IBOTPatchLoss(V, 0.05, 0.2, "mean", 0.7).double(), torch.zeros(V, dtype=F64)
    for temp in (None, 0.07, 0.04):
        mask = some_mask()
        teacher, student = masked_tokens(mask)
        flat = mask.flatten(1)
        value = loss_fn(teacher[flat], student[flat], mask, temp)
        same(value, ibot(teacher, student, mask, center, temp or 0.05, 0.2), student)
        center = 0.7 * center + 0.3 * teacher[flat].mean(0)
        torch.testing.assert_close(loss_fn.center.center, center.view(1, V))


def test_ibot_dinov2_weights() -> None:
    """DINOv2's code: a weight of 1 / (masked tokens of the image) for each token, over all images."""
    mask = some_mask()
    teacher, student = (x[mask.flatten(1)] for x in masked_tokens(mask))
    weight = (1 / mask.flatten(1).sum(-1).clamp(min=1.0)).unsqueeze(-1).expand(6, 20)[mask.flatten(1)].double()
    rows = torch.sum(F.softmax(teacher / 0.07, -1) * F.log_softmax(student / 0.1, -1), dim=-1)
    same(ibot_patch_loss(teacher, student, mask, teacher_temp=0.07), -(rows * weight).sum() / 6, student, rtol=1e-6)


def test_ibot_centre_of_all_tokens() -> None:
    """iBOT's own: its centre takes the tokens that are not masked as well."""
    mask = some_mask()
    teacher, student = masked_tokens(mask)
    loss_fn, flat = IBOTPatchLoss(V).double(), mask.flatten(1)
    loss_fn(teacher[flat], student[flat], mask, center_mean=teacher.flatten(0, 1).mean(0))
    torch.testing.assert_close(loss_fn.center.center, 0.1 * teacher.flatten(0, 1).mean(0)[None])


def test_ibot_with_sinkhorn() -> None:
    mask = some_mask()
    teacher, student = (x[mask.flatten(1)] for x in masked_tokens(mask))
    loss_fn = IBOTPatchLoss(V, 0.07, center_mode="sinkhorn_knopp").double()
    rows = -(sinkhorn(teacher, 0.07) * F.log_softmax(student / 0.1, -1)).sum(-1)
    weight = torch.cat([torch.full((n,), 1 / n) for n in mask.flatten(1).sum(1).tolist() if n]).double()
    same(loss_fn(teacher, student, mask), (rows * weight).sum() / 6, student, rtol=1e-6)


@pytest.mark.parametrize("center_mode", ["mean", "sinkhorn_knopp"])
def test_ibot_of_hidden_rows(center_mode: str) -> None:
    mask = some_mask()
    weight = torch.randn(V, D, dtype=F64, requires_grad=True)
    teacher, student = (torch.randn(int(mask.sum()), D, dtype=F64, requires_grad=True) for _ in range(2))
    hidden, logits = (IBOTPatchLoss(V, 0.4, center_mode=center_mode).double() for _ in range(2))
    for _ in range(2):
        expected = logits(F.linear(teacher, weight).detach(), F.linear(student, weight), mask)
        same(hidden(teacher, student, mask, weight=weight), expected, weight, student)
        torch.testing.assert_close(hidden.center.center, logits.center.center)


@pytest.mark.parametrize("center_mode", ["mean", "sinkhorn_knopp"])
@pytest.mark.parametrize("layer", [False, True], ids=["logits", "hidden rows"])
def test_ibot_without_a_masked_token(layer: bool, center_mode: str) -> None:
    """Nothing to learn: 0 with a gradient of 0, which a step across processes waits for, and the same centre."""
    loss_fn, mask = IBOTPatchLoss(V, center_mode=center_mode), torch.zeros(3, 4, 4, dtype=torch.bool)
    loss_fn.center.center += 0.5
    weight = torch.randn(V, D, requires_grad=True) if layer else None
    student = torch.randn(0, D if layer else V, requires_grad=True)
    loss = loss_fn(student.detach(), student, mask, weight=weight)
    loss.backward()
    assert loss == 0 and student.grad is not None and student.grad.shape == student.shape
    assert weight is None or (weight.grad is not None and not weight.grad.any())
    assert (loss_fn.center.center == 0.5).all()


# SwAV


def swav(high: list[Tensor], low: list[Tensor], queue: list[Tensor] | None, temperature: float, eps: float) -> Tensor:
    """main_swav.py: codes of each assigned crop, queue below the batch; each other crop predicts them."""
    loss, crops = torch.zeros((), dtype=F64), [*high, *low]
    for i, scores in enumerate(high):
        out = scores.detach() if queue is None else torch.cat([scores.detach(), queue[i]])
        q = sinkhorn(out, eps)[:B]
        part = torch.zeros((), dtype=F64)
        for v, x in enumerate(crops):
            if v != i:
                part = part - torch.mean(torch.sum(q * F.log_softmax(x / temperature, dim=1), dim=1))
        loss = loss + part / (len(crops) - 1)
    return loss / len(high)


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize(("assigned", "low"), [(2, 0), (2, 4), (1, 2), (3, 1)])
def test_swav(assigned: int, low: int, queued: bool) -> None:
    high_, low_ = views(assigned), views(low)
    queue = [x.detach() for x in views(assigned, batch=11)] if queued else None
    same(SwaVLoss()(high_, low_, queue), swav(high_, low_, queue, 0.1, 0.05), *high_, *low_)
    same(SwaVLoss(0.3, 3, 0.2)(high_, low_, queue), swav(high_, low_, queue, 0.3, 0.2), *high_, *low_)
    assert swav_loss(high_, low_, queue).shape == ()


# what all modules share


def dino_call(**options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    return DINOLoss(V, **options), (views(2, dtype=torch.float32), views(5, dtype=torch.float32))


def ibot_call(**options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    mask = some_mask()
    teacher, student = (torch.randn(int(mask.sum()), V) for _ in range(2))
    return IBOTPatchLoss(V, **options), (teacher, student.requires_grad_(), mask)


def swav_call() -> tuple[nn.Module, tuple[Any, ...]]:
    high, low, queue = (views(n, b, torch.float32) for n, b in ((2, B), (3, B), (2, 7)))
    return SwaVLoss(), (high, low, queue)


MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "DINOLoss": dino_call,
    "DINOLoss sinkhorn": lambda: dino_call(center_mode="sinkhorn_knopp"),
    "IBOTPatchLoss": ibot_call,
    "IBOTPatchLoss sinkhorn": lambda: ibot_call(center_mode="sinkhorn_knopp"),
    "SwaVLoss": swav_call,
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_with_the_step_of_the_centre(name: str) -> None:
    torch.compiler.reset()
    module, _ = MODULES[name]()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(3):  # other numbers of masked tokens make that symbolic
        _, args = MODULES[name]()
        torch.testing.assert_close(compiled(*args), eager(*args))
        for x, y in zip(module.buffers(), eager.buffers()):
            torch.testing.assert_close(x, y)
            assert x.any() == ("sinkhorn" not in name)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "SwaVLoss"])
def test_gradient_in_the_place_of_the_logits(name: str) -> None:
    """The same gradient, in memory that the student's logits had."""
    module, (teacher, student, *rest) = MODULES[name]()
    layer = nn.Linear(V, V)
    inputs = student if isinstance(student, list) else [student]
    gradients = []
    for inplace in (False, True):
        logits = [layer(x) for x in inputs]
        before = [x.detach().clone() for x in logits]
        loss = copy.deepcopy(module)(teacher, logits if student is inputs else logits[0], *rest, inplace=inplace)
        assert all(torch.equal(x, y) != inplace for x, y in zip(logits, before))
        gradients.append(torch.autograd.grad(loss, [*inputs, *layer.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layer", [False, True], ids=["logits", "hidden rows"])
def test_compiled_through_backward(layer: bool) -> None:
    torch.compiler.reset()
    module, weight = DINOLoss(V), torch.randn(V, D, requires_grad=True)
    teacher, student = (views(n, dtype=torch.float32, width=D if layer else V) for n in (2, 4))
    options = {"weight": weight} if layer else {}
    inputs = [*student, weight] if layer else student
    expected = torch.autograd.grad(copy.deepcopy(module)(teacher, student, epoch=0, **options), inputs)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(teacher, student, epoch=0, **options), inputs), expected)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Leaves of another dtype; a mask stays."""
    if isinstance(x, list):
        return [cast(y, dtype) for y in x]
    return x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_16_bits(name: str, dtype: torch.dtype) -> None:
    """As an autocast head gives them: loss and centre stay float32, the gradient is of the logits' dtype."""
    module, args = MODULES[name]()
    narrow = [
        [y.detach().to(dtype).requires_grad_() for y in x] if isinstance(x, list)
        else x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
        for x in args
    ]  # fmt: skip
    wide = copy.deepcopy(module).double()
    exact = wide(
        *([y.double() for y in x] if isinstance(x, list) else x.double() if x.ndim == 2 else x for x in narrow)
    )
    with torch.autocast("cpu", dtype=dtype):
        loss = module(*narrow)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=0)
    for x, y in zip(module.buffers(), wide.buffers()):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
    loss.backward()
    students = narrow[0] + narrow[1] if name == "SwaVLoss" else narrow[1] if "DINO" in name else [narrow[1]]
    assert all(x.grad is not None and x.grad.dtype == dtype for x in students)


def test_states_are_those_of_lightly() -> None:
    assert {k: tuple(v.shape) for k, v in DINOLoss(V).state_dict().items()} == {"center": (1, 1, V)}
    assert {k: tuple(v.shape) for k, v in IBOTPatchLoss(V).state_dict().items()} == {"center.center": (1, V)}
    assert not SwaVLoss().state_dict()


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip(name: str) -> None:
    module, args = MODULES[name]()
    module(*args)
    other, _ = MODULES[name]()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*args), module(*args))
    for x, y in zip(other.buffers(), module.buffers()):
        assert torch.equal(x, y)


def test_repr_names_the_options() -> None:
    assert repr(DINOLoss(V)) == (
        f"DINOLoss(output_dim={V}, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=30, "
        "student_temp=0.1, center_momentum=0.9, center_mode=mean)"
    )
    assert f"output_dim={V}, teacher_temp=0.04, student_temp=0.1, center_mode=mean" in repr(IBOTPatchLoss(V))
    assert repr(SwaVLoss()) == "SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)"


def test_centre_given_to_the_function() -> None:
    """Also (T, V), one a view; and the mean comes with the loss."""
    teacher, student = views(2), views(3)
    centers = torch.randn(2, V, dtype=F64)
    loss, mean = dino_loss(teacher, student, centers, return_center=True)
    shifted = [t.detach() - c for t, c in zip(teacher, centers)]
    same(loss, dino(shifted, student, torch.zeros(V, dtype=F64), 0.04, 0.1), *student)
    torch.testing.assert_close(mean, torch.cat(teacher).detach().mean(0))
    rows, mask = torch.randn(7, V), torch.ones(1, 7, dtype=torch.bool)
    torch.testing.assert_close(ibot_patch_loss(rows, rows, mask, return_center=True)[1], rows.mean(0))


def test_a_mask_that_does_not_fit_is_nan_where_its_values_are_not_read() -> None:
    torch.compiler.reset()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, :3] = mask[1, :2] = True
    compiled = torch.compile(ibot_patch_loss, backend="aot_eager", fullgraph=True)
    for tokens in (4, 5, 6):
        x = torch.randn(tokens, V)
        assert compiled(x, x, mask).isnan() == (tokens != 5)


T, S, MASK = torch.randn(2, B, V), torch.randn(4, B, V), torch.ones(2, 3, dtype=torch.bool)
ROWS = torch.randn(6, V)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one view of each": (lambda: DINOLoss(V)(T[:1], S[:1]), ValueError, "student_out must have at least two views, or"),
    "views without a list": (
        lambda: DINOLoss(V)(T[0], S),
        ValueError,
        f"teacher_out must be a list of views (B, V) or one tensor (S, B, V), got shape ({B}, {V})",
    ),
    "a view of one dimension": (lambda: dino_loss([T[0], T[0, 0]], S), ValueError, "teacher_out[1] must be a list of"),
    "no samples": (lambda: dino_loss(T[:, :0], S[:, :0]), ValueError, "teacher_out must not be an empty batch, got"),
    "no tensor": (lambda: dino_loss([1.0], S), TypeError, "teacher_out[0] must be a torch.Tensor, got float"),
    "integers": (lambda: dino_loss(T, S.long()), TypeError, "student_out must be float32, float64, bfloat16 or"),
    "other prototypes": (lambda: DINOLoss(V + 1)(T, S), ValueError, "center must have shape"),
    "teacher's layer alone": (lambda: dino_loss(T, S, teacher_weight=T[0]), ValueError, "teacher_weight must not be"),
    "no logits to write over": (
        lambda: dino_loss(T, S, weight=torch.randn(9, V), inplace=True),
        ValueError,
        "inplace must be False with weight",
    ),
    "center_mode": (lambda: DINOLoss(V, center_mode="max"), ValueError, "center_mode must be one of 'mean', 'sink"),
    "output_dim": (lambda: DINOLoss(0), ValueError, "output_dim must be at least 1, got 0"),
    "momentum": (lambda: IBOTPatchLoss(V, center_momentum=1.5), ValueError, "center_momentum must be in [0.0, 1.0)"),
    "temperature": (lambda: DINOLoss(V, teacher_temp=0.0), ValueError, "teacher_temp must be positive and finite"),
    "warmup": (lambda: DINOLoss(V, -1.0), ValueError, "warmup_teacher_temp must be positive and finite, got -1.0"),
    "temperature of a call": (lambda: DINOLoss(V)(T, S, -0.1), ValueError, "teacher_temp must be positive"),
    "mask of integers": (lambda: ibot_patch_loss(ROWS, ROWS, MASK.long()), TypeError, "mask must be torch.bool, got"),
    "mask of one image": (
        lambda: ibot_patch_loss(ROWS, ROWS, MASK[0]),
        ValueError,
        "mask must have shape (B, ...)",
    ),
    "mask of other tokens": (
        lambda: ibot_patch_loss(ROWS[1:], ROWS[1:], MASK),
        ValueError,
        "mask must have 5 true, as many as there are tokens, got 6",
    ),
    "tokens with views": (lambda: ibot_patch_loss(T, T, MASK), ValueError, "teacher_out must have shape (N, V), got"),
    "other tokens": (
        lambda: ibot_patch_loss(ROWS, ROWS[1:], MASK),
        ValueError,
        "student_out must have shape (6, V)",
    ),
    "mean with sinkhorn": (
        lambda: IBOTPatchLoss(V, center_mode="sinkhorn_knopp")(ROWS, ROWS, MASK, center_mean=ROWS[0]),
        ValueError,
        "center_mean must not be given with center_mode='sinkhorn_knopp'",
    ),
    "mean of other width": (
        lambda: IBOTPatchLoss(V)(ROWS, ROWS, MASK, center_mean=ROWS[0, 1:]),
        ValueError,
        f"center_mean must have shape ({V},), got ({V - 1},)",
    ),
    "one crop": (lambda: swav_loss([ROWS]), ValueError, "high_resolution_outputs must hold a crop, and with low"),
    "no crop": (lambda: swav_loss([]), ValueError, "high_resolution_outputs must hold a crop, and with low"),
    "low alone": (lambda: swav_loss([], [ROWS, ROWS]), ValueError, "high_resolution_outputs must hold a crop, and"),
    "other batch": (
        lambda: swav_loss([ROWS], [ROWS[1:]]),
        ValueError,
        "low_resolution_outputs[0] must have shape",
    ),
    "scores of one dimension": (lambda: swav_loss([ROWS[0]] * 2), ValueError, "[0] must have shape (B, K), got (37,)"),
    "no samples in a crop": (
        lambda: swav_loss([ROWS[:0]] * 2),
        ValueError,
        "must not be an empty batch",
    ),
    "a queue for one of two": (
        lambda: swav_loss([ROWS, ROWS], [], [ROWS]),
        ValueError,
        "queue_outputs must hold one queue for each of 2 crops, got 1",
    ),
    "queue of other width": (
        lambda: swav_loss([ROWS, ROWS], [], [ROWS, ROWS[:, 1:]]),
        ValueError,
        "queue_outputs[1] must have shape (Q, 37), got (6, 36)",
    ),
    "iterations": (
        lambda: SwaVLoss(sinkhorn_iterations=0),
        ValueError,
        "sinkhorn_iterations must be at least 1",
    ),
    "half a group": (
        lambda: SwaVLoss(process_group="half")([ROWS, ROWS]),
        ValueError,
        "process_group must be a ProcessGroup, 'world' or None, got 'half'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_nothing_is_moved_by_a_call_that_is_refused() -> None:
    module = IBOTPatchLoss(V)
    with pytest.raises(ValueError, match="center_mean"):
        module(ROWS, ROWS, MASK, center_mean=ROWS)
    assert not module.center.center.any()
    assert ops.sinkhorn_center(ROWS).shape == (V,)
