# SPDX-License-Identifier: Apache-2.0
"""The collectives as ops, with the gradients of what they compute; nothing else here talks to torch.distributed.

A rank's loss depends on what others brought. The gradient here is that of the sum of all ranks' losses, so that the
gradient of a sum over ranks is the sum over ranks of the gradients, and that of gathered rows is scattered back.
The ops are opaque to compilers, which therefore take the whole of a distributed loss into one graph.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels.distributed._faults import Work, guard
from sslkernels.ops._registry import define, differentiable
from sslkernels.reference._precision import compute_dtype


def find(name: str) -> Any:
    """The process group of this name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def _renamed(name: str, before: str) -> Any:
    """A function of torch.distributed under its name of torch 2.13, or the one it had before."""
    import torch.distributed as dist

    return getattr(dist, name, None) or getattr(dist, before)


def ranks_of(name: str) -> list[int]:
    """The ranks of a group's members among all processes, as their logs and launcher name them."""
    import torch.distributed as dist

    return dist.get_process_group_ranks(find(name))


def has_cpu_backend(name: str) -> bool:
    return any(device.type == "cpu" for device in find(name)._device_types)


# what torch.compiler.assume_constant_result does, which imports all of torch._dynamo for it
has_cpu_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


# sum


def _all_sum(x: Tensor, group: str) -> Tensor:
    import torch.distributed as dist

    out, pg = x.clone(memory_format=torch.contiguous_format), find(group)
    with guard(pg):
        dist.all_reduce(out, group=pg)
    return out


all_sum = define(
    "distributed_sum(Tensor x, str group) -> Tensor",
    reference=_all_sum,
    fake=lambda x, group: torch.empty_like(x, memory_format=torch.contiguous_format),
    everywhere=True,
)


def _all_sum_setup(ctx, inputs, output) -> None:
    ctx.group = inputs[1]


differentiable(
    all_sum,
    setup_context=_all_sum_setup,
    backward=lambda ctx, grad: (None if grad is None else all_sum(grad, ctx.group), None),
)

# what all ranks have

# x, computed alike on every rank from sums over the ranks whose gradient is left out: its gradient here is the sum of
# what the ranks have for it. Say S is the sum of the ranks' S_r and each rank returns shared(L(S)): then dL/dS times
# the gradient that arrives is that of the sum of all ranks' losses, and a number crossed in place of a matrix.
shared = define(
    "distributed_shared(Tensor x, str group) -> Tensor",
    reference=lambda x, group: x.clone(),
    fake=lambda x, group: torch.empty_like(x),
    everywhere=True,
)
differentiable(
    shared,
    setup_context=_all_sum_setup,
    backward=lambda ctx, grad: (None if grad is None else all_sum(grad, ctx.group), None),
)


def start_sum(x: Tensor, group: str) -> Any:
    """Begin to sum x over the ranks, in place: the work to wait for."""
    import torch.distributed as dist

    pg = find(group)
    with guard(pg):
        return Work(dist.all_reduce(x, group=pg, async_op=True), pg)


# maximum


def _all_max(x: Tensor, group: str) -> Tensor:
    import torch.distributed as dist

    out, pg = x.clone(memory_format=torch.contiguous_format), find(group)
    with guard(pg):
        dist.all_reduce(out, dist.ReduceOp.MAX, group=pg)
    return out


all_max = define(
    "distributed_max(Tensor x, str group) -> Tensor",
    reference=_all_max,
    fake=lambda x, group: torch.empty_like(x, memory_format=torch.contiguous_format),
    everywhere=True,
)
differentiable(
    all_max,
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output),
    backward=lambda ctx, grad: (None, None),
)

# rows of all ranks, and their sum returned to them


def row_counts(rows: int, sizes: Tensor | None, world: int) -> list[int]:
    return [rows] * world if sizes is None else sizes.tolist()


def start_gather(x: Tensor, counts: Sequence[int], group: str) -> tuple[Any, Any]:
    """Begin to bring the rows of all ranks together: the work to wait for, and how to take the result after that."""
    all_gather = _renamed("all_gather_single", "all_gather_into_tensor")
    most = max(counts)
    sent = x if x.shape[0] == most else torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    out = x.new_empty(len(counts) * most, *x.shape[1:])
    pg = find(group)
    with guard(pg):
        work = Work(all_gather(out, sent.contiguous(), group=pg, async_op=True), pg)
    if min(counts) == most:
        return work, lambda: out
    return work, lambda: torch.cat([part[:n] for part, n in zip(out.split(most), counts)])


def start_scatter(x: Tensor, counts: Sequence[int], rows: int, group: str) -> tuple[Any, Any]:
    """Begin to sum x over the ranks and to give each its rows: the work, and how to take the result."""
    reduce_scatter = _renamed("reduce_scatter_single", "reduce_scatter_tensor")
    most = max(counts)
    if min(counts) < most:
        padded = x.new_zeros(len(counts), most, *x.shape[1:])
        for place, part in zip(padded, x.split(list(counts))):
            place[: len(part)] = part
        x = padded.flatten(0, 1)
    out, pg = x.new_empty(most, *x.shape[1:]), find(group)
    with guard(pg):
        work = Work(reduce_scatter(out, x.contiguous(), group=pg, async_op=True), pg)
    return work, lambda: out[:rows]


def all_to_all(x: Tensor, counts: Sequence[int], rows: int, group: str) -> Tensor:
    """What every rank has for this one's rows, (world * rows, ...), in the order of the ranks."""
    import torch.distributed as dist

    out, pg = x.new_empty(len(counts) * rows, *x.shape[1:]), find(group)
    with guard(pg):
        dist.all_to_all_single(out, x.contiguous(), [rows] * len(counts), list(counts), group=pg)
    return out


def start_swap(sent: Sequence[Tensor], received: Sequence[Tensor], to: int, source: int, group: str) -> list[Any]:
    """Begin to send to one rank of the group and to receive from another."""
    import torch.distributed as dist

    pg = find(group)
    ops = [dist.P2POp(dist.isend, x, group=pg, group_peer=to) for x in sent]
    ops += [dist.P2POp(dist.irecv, x, group=pg, group_peer=source) for x in received]
    with guard(pg):
        return [Work(work, pg) for work in dist.batch_isend_irecv(ops)]


def _gather_rows(x: Tensor, sizes: Tensor | None, world: int, group: str) -> Tensor:
    work, result = start_gather(x, row_counts(x.shape[0], sizes, world), group)
    work.wait()
    return result()


def _gather_rows_fake(x, sizes, world, group):
    rows = x.shape[0] * world if sizes is None else torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(rows, *x.shape[1:])


gather_rows = define(
    "distributed_gather(Tensor x, Tensor? sizes, SymInt world, str group) -> Tensor",
    reference=_gather_rows,
    fake=_gather_rows_fake,
    everywhere=True,
)


def _scatter_rows(x: Tensor, sizes: Tensor | None, rows: int, world: int, group: str) -> Tensor:
    wide = x.to(compute_dtype(x))  # 16-bit sums of a thousand ranks would lose what each adds
    work, result = start_scatter(wide, row_counts(rows, sizes, world), rows, group)
    work.wait()
    return result().to(x.dtype)


scatter_rows = define(
    "distributed_scatter(Tensor x, Tensor? sizes, SymInt rows, SymInt world, str group) -> Tensor",
    reference=_scatter_rows,
    fake=lambda x, sizes, rows, world, group: x.new_empty(rows, *x.shape[1:]),
    everywhere=True,
)


def _gather_setup(ctx, inputs, output) -> None:
    x, sizes, ctx.world, ctx.group = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(sizes)


def _gather_autograd(ctx, grad):
    (sizes,) = ctx.saved_tensors
    dx = None if grad is None else scatter_rows(grad, sizes, ctx.rows, ctx.world, ctx.group)
    return dx, None, None, None


def _scatter_setup(ctx, inputs, output) -> None:
    _, sizes, _, ctx.world, ctx.group = inputs
    ctx.save_for_backward(sizes)


def _scatter_autograd(ctx, grad):
    (sizes,) = ctx.saved_tensors
    return None if grad is None else gather_rows(grad, sizes, ctx.world, ctx.group), None, None, None, None


differentiable(gather_rows, setup_context=_gather_setup, backward=_gather_autograd)
differentiable(scatter_rows, setup_context=_scatter_setup, backward=_scatter_autograd)

# what ranks bring


def gather_words(mine: Tensor, world: int, group: str) -> Tensor:
    """int64 (n,) of every rank, (world, n)."""
    all_gather = _renamed("all_gather_single", "all_gather_into_tensor")
    out, pg = mine.new_empty(world * mine.shape[0]), find(group)
    with guard(pg):
        all_gather(out, mine, group=pg)
    return out.view(world, -1)
