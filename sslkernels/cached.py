# SPDX-License-Identifier: Apache-2.0
"""Exact gradients of a loss that looks at the whole batch, with the memory of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sslkernels import _checks as check
from sslkernels._held import modules_of

__all__ = ["cached_step"]

# by which the second features may differ from the first, relative to their norm: another kernel's rounding
FAITHFUL = {torch.float64: 1e-8, torch.float32: 1e-3}
FAITHFUL_IN_16_BITS = 0.05


def cached_step(
    model: Callable[..., Any],
    loss_fn: Callable[..., Any],
    *inputs: Any,
    micro_batch: int,
    scaler: Any = None,
    batch_norm: str = "refuse",
    **kwargs: Any,
) -> Any:
    """Forward and backward of `loss_fn(*model(*inputs))` on the whole batch, `micro_batch` rows at a time in the model.

        features = cat of model(rows) over the micro-batches               no graph
        loss = loss_fn(features);  g = dloss/dfeatures                     whole batch, features as leaves
        for each micro-batch: model(rows).backward(its rows of g)          random numbers as in the first forward

    Gradients are added to `.grad` as by `loss.backward()`, and are those of the loss of the whole batch: the model's
    and those of any parameter that `loss_fn` uses, a temperature say. It costs one more forward.

    Args:
        model: a module, or any function; a module wrapped in DistributedDataParallel, or holding such, averages once,
            in the last backward. Of a function that goes for all modules that it holds: bound to it, in its closure,
            its arguments by `functools.partial`, or globals, lists and attributes that it names, and those of the
            functions that it calls. From one that it reaches otherwise, hide no DistributedDataParallel: it would
            average in each backward, and ranks of different numbers of micro-batches would wait for each other.
        loss_fn: takes the features as the model returns them: a tensor, a tuple as `*features`, a dict as `**features`;
            returns a loss of one element, or (loss, what else is wanted of the whole batch).
        inputs, kwargs: of the model. Tensors in them, in containers too, are split along their first dimension, which
            all have in common; 0-D tensors and all else go to every micro-batch.
        micro_batch: rows of a forward; the last may have fewer.
        scaler: a `torch.amp.GradScaler`, whose scale the gradients then have.
        batch_norm: in training mode its statistics are of the rows it sees. "refuse": raise. "micro_batch": take those
            of the micro-batch, another network than that of the whole batch; running averages move once a micro-batch.
            Of a function all modules that it holds are looked at whole, whichever part it calls.

    The model's features have a row for each of the micro-batch's; a 0-D one is taken as a mean, that is, averaged over
    the rows, which leaves a logit scale that the model returns as it is. Called under `torch.autocast`, all forwards
    are.

    Replayed are torch's own generators, those of the devices at hand, and generators among the inputs; buffers have
    the values that the first forward and `loss_fn` left. Draws from elsewhere cannot be replayed: where values may be
    read (on the CPU, or under `check_values`) features that differ in the second forward by more than rounding raise:
    by 1e-3 of their norm in float32, 1e-8 in float64, 0.05 with 16-bit features or parameters or under autocast.

    With DistributedDataParallel, a parameter of the wrapped module that `loss_fn` uses past its forward is averaged
    with the others; with `find_unused_parameters=True` return it from the forward instead. `static_graph=True` is
    refused, as its first backward knows no `no_sync`. Under `no_sync` nothing is averaged. Ranks may have different
    numbers of rows.

    Returns:
        The loss, detached, or (loss, the rest, detached).

    Raises:
        ValueError, TypeError: micro_batch not positive, inputs or features of other numbers of rows, no tensor among
            them, batch norm in training mode, a kind of DistributedDataParallel that is not supported.
        RuntimeError: the second forward gave other features.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".

    Example:
        >>> from sslkernels.losses import nt_xent
        >>> model, views = nn.Linear(8, 4), torch.randn(2, 64, 8).unbind()
        >>> loss = cached_step(lambda a, b: (model(a), model(b)), nt_xent, *views, micro_batch=16)
        >>> loss.requires_grad, model.weight.grad.shape
        (False, torch.Size([4, 8]))
    """
    check.integer("micro_batch", micro_batch, 1)
    check.choice("batch_norm", batch_norm, ("refuse", "micro_batch"))
    modules = modules_of(model)
    averaged = _check_modules(modules, batch_norm)
    batch = _Rows.of((inputs, kwargs), micro_batch)
    devices = _devices(modules, batch.leaves)
    coarse = _in_16_bits(modules, devices)
    generators = [x for x in batch.leaves if isinstance(x, torch.Generator)]

    states, outputs = [], []
    with torch.no_grad():
        for rows in batch.slices:
            states.append(_State.now(devices, generators))
            args, named = batch.part(rows)
            outputs.append(_Features.of(model(*args, **named), rows))

    features = _Features.together(outputs, batch.slices)
    del outputs
    with _apart(averaged) as own:
        loss, rest = _loss(loss_fn, features)
        with _no_autocast(devices):
            (loss if scaler is None else scaler.scale(loss)).backward()
    if own and any(ddp.find_unused_parameters for ddp in averaged):
        raise ValueError(
            "loss_fn uses a parameter of a module under DistributedDataParallel(find_unused_parameters=True) past its "
            "forward: return the parameter from the forward"
        )

    kept = [(x, x.clone()) for x in {id(x): x for module in modules for x in module.buffers()}.values()]
    end = _State.now(devices, generators)
    try:
        for i, (rows, state) in enumerate(zip(batch.slices, states)):
            last = i == len(states) - 1
            with ExitStack() as stack:
                for ddp in averaged if not last else ():
                    stack.enter_context(ddp.no_sync())
                state.restore()
                args, named = batch.part(rows)
                again = _Features.of(model(*args, **named), rows)
                roots = features.gradients(again, rows, rows_in_all=batch.size, coarse=coarse) + own * last
                if roots:
                    with _no_autocast(devices):
                        torch.autograd.backward([x for x, _ in roots], [grad for _, grad in roots])
                del again, roots
    finally:
        end.restore()
        with torch.no_grad():
            for x, value in kept:
                x.copy_(value)
    return loss.detach() if rest is None else (loss.detach(), *rest)


class _Rows(NamedTuple):
    """The inputs, and which rows a micro-batch has."""

    leaves: list[Any]
    spec: Any
    size: int
    slices: list[slice]

    @classmethod
    def of(cls, inputs: Any, micro_batch: int) -> _Rows:
        leaves, spec = tree_flatten(inputs)
        sizes = {x.shape[0] for x in leaves if isinstance(x, Tensor) and x.ndim}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"the tensors among inputs must have one positive number of rows in common, got {sorted(sizes)}"
            )
        size = sizes.pop()
        return cls(leaves, spec, size, [slice(i, min(i + micro_batch, size)) for i in range(0, size, micro_batch)])

    def part(self, rows: slice) -> Any:
        parts = [x[rows] if isinstance(x, Tensor) and x.ndim else x for x in self.leaves]
        return tree_unflatten(parts, self.spec)


class _Features(NamedTuple):
    """What the model returned: the tensors, and how to put them together again."""

    leaves: list[Any]
    spec: Any

    @classmethod
    def of(cls, output: Any, rows: slice) -> _Features:
        leaves, spec = tree_flatten(output)
        wanted = rows.stop - rows.start
        for x in leaves:
            if isinstance(x, Tensor) and x.ndim and x.shape[0] != wanted:
                raise ValueError(f"the model must return {wanted} rows for {wanted} rows, got shape {tuple(x.shape)}")
        if not any(isinstance(x, Tensor) and x.ndim for x in leaves):
            raise TypeError(f"the model must return tensors of features, got {type(output).__name__}")
        return cls(leaves, spec)

    @classmethod
    def together(cls, outputs: Sequence[_Features], slices: Sequence[slice]) -> _Features:
        """Those of the whole batch, as leaves that take gradients."""
        shares = [(rows.stop - rows.start) / slices[-1].stop for rows in slices]

        def join(parts: Sequence[Any]) -> Any:
            first = parts[0]
            if not isinstance(first, Tensor):
                return first
            if first.ndim:
                whole = torch.cat(list(parts))
            elif first.is_floating_point():
                # exactly the first, where all are alike
                whole = first + sum(share * (x - first) for x, share in zip(parts, shares))
            else:
                whole = first
            return whole.requires_grad_(whole.is_floating_point())

        return cls([join(parts) for parts in zip(*(x.leaves for x in outputs))], outputs[0].spec)

    def gradients(
        self, again: _Features, rows: slice, rows_in_all: int, *, coarse: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """What the second forward made of these rows, each with the gradient it takes."""
        roots = []
        for whole, x in zip(self.leaves, again.leaves):
            if not isinstance(x, Tensor):
                continue
            if x.ndim and x.is_floating_point() and check.readable(x):
                _check_faithful(whole.detach()[rows], x.detach(), coarse)
            if x.requires_grad and whole.grad is not None:
                share = (rows.stop - rows.start) / rows_in_all
                roots.append((x, whole.grad[rows] if x.ndim else whole.grad * share))
        return roots


def _check_faithful(first: Tensor, second: Tensor, coarse: bool) -> None:
    error = (first - second).norm() / first.norm()
    most = FAITHFUL_IN_16_BITS if coarse else FAITHFUL.get(second.dtype, FAITHFUL_IN_16_BITS)
    if error > most:  # not of a NaN
        raise RuntimeError(
            f"the second forward gave features that differ by {error:.1g}: the model must not draw from other "
            "generators than torch's, nor depend on buffers or attributes that its forward changes"
        )


def _loss(loss_fn: Callable[..., Any], features: _Features) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The loss, and what was returned with it, detached."""
    found = tree_unflatten(features.leaves, features.spec)
    if isinstance(found, Mapping):
        result = loss_fn(**found)
    else:
        result = loss_fn(*found) if isinstance(found, tuple | list) else loss_fn(found)
    if isinstance(result, Tensor):
        return result, None
    if not (isinstance(result, tuple | list) and result and isinstance(result[0], Tensor)):
        raise TypeError(f"loss_fn must return a tensor, or (loss, ...), got {type(result).__name__}")
    loss, *rest = result
    return loss, tuple(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, rest))


def _check_modules(modules: Sequence[nn.Module], batch_norm: str) -> list[DistributedDataParallel]:
    """Those that average gradients over processes."""
    parts = {id(part): (name, part) for module in modules for name, part in module.named_modules()}.values()
    for name, part in parts:
        normalizes = isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training
        if normalizes and batch_norm == "refuse":
            raise ValueError(
                f"{name or 'the model'} is batch norm in training mode, whose statistics would be of a micro-batch: "
                "give batch_norm='micro_batch' if that is wanted, or call eval() on it, or use another norm"
            )
    averaged = [part for _, part in parts if isinstance(part, DistributedDataParallel)]
    if any(ddp.static_graph for ddp in averaged):
        raise ValueError("DistributedDataParallel(static_graph=True) is not supported: its first backward must average")
    return averaged


@contextmanager
def _apart(averaged: Sequence[DistributedDataParallel]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects the gradients of the averaged modules' own parameters, which the last backward then takes with it.

    Each must come to DistributedDataParallel once, in the backward that averages; a parameter whose gradient came
    before would not be averaged, nor would others in its bucket.
    """
    own: list[tuple[Tensor, Tensor]] = []
    parameters = [p for ddp in averaged for p in ddp.parameters() if p.requires_grad]
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield own
    finally:
        for p, grad in zip(parameters, kept):
            if p.grad is not None:
                own.append((p, p.grad))
            p.grad = grad


class _State(NamedTuple):
    """Of the generators that the model may draw from."""

    cpu: Tensor
    devices: list[tuple[torch.device, Tensor]]
    generators: list[tuple[torch.Generator, Tensor]]

    @classmethod
    def now(cls, devices: Sequence[torch.device], generators: Sequence[torch.Generator]) -> _State:
        others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices if d.type != "cpu"]
        return cls(torch.get_rng_state(), others, [(g, g.get_state()) for g in generators])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        for generator, state in self.generators:
            generator.set_state(state)


def _devices(modules: Sequence[nn.Module], leaves: Sequence[Any]) -> list[torch.device]:
    parameters = [p for module in modules for p in module.parameters()]
    found = {x.device for x in (*leaves, *parameters) if isinstance(x, Tensor)} | {torch.device("cpu")}
    return sorted(found, key=str)


def _in_16_bits(modules: Sequence[nn.Module], devices: Sequence[torch.device]) -> bool:
    """Whether features are rounded to 16 bits on their way, whatever dtype they come in."""
    if any(p.is_floating_point() and p.itemsize < 4 for module in modules for p in module.parameters()):
        return True
    return any(_autocasts(kind) for kind in {device.type for device in devices})


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextmanager
def _no_autocast(devices: Sequence[torch.device]) -> Iterator[None]:
    """A backward takes the dtypes of its forward, and none of autocast's."""
    with ExitStack() as stack:
        for kind in {device.type for device in devices}:
            if _autocasts(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
