# SPDX-License-Identifier: Apache-2.0
"""The collectives as ops, with the gradients of what they compute; nothing else here talks to torch.distributed.

A rank's loss depends on what others brought. The gradient here is that of the sum of all ranks' losses, so that the
gradient of a sum over ranks is the sum over ranks of the gradients, and that of gathered rows is scattered back.
The ops are opaque to compilers, which therefore take the whole of a distributed loss into one graph.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels.ops._registry import define, differentiable
from sslkernels.reference._precision import compute_dtype

WORDS = 64  # int64 numbers that describe what a rank brings
TENSOR_WORDS = 9  # of one tensor: dtype, device, gradient, number of dimensions, up to five sizes
MOST = (WORDS - 2) // TENSOR_WORDS  # tensors that are compared
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.bool, torch.uint8),
)


def find(name: str) -> Any:
    """The process group of this name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def has_cpu_backend(name: str) -> bool:
    return any(device.type == "cpu" for device in find(name)._device_types)


# what torch.compiler.assume_constant_result does, which imports all of torch._dynamo for it
has_cpu_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


# sum


def _all_sum(x: Tensor, group: str) -> Tensor:
    import torch.distributed as dist

    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=find(group))
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

# rows of all ranks, and their sum returned to them


def row_counts(rows: int, sizes: Tensor | None, world: int) -> list[int]:
    return [rows] * world if sizes is None else sizes.tolist()


def start_gather(x: Tensor, counts: Sequence[int], group: str) -> tuple[Any, Any]:
    """Begin to bring the rows of all ranks together: the work to wait for, and how to take the result after that."""
    import torch.distributed as dist

    most = max(counts)
    sent = x if x.shape[0] == most else torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    out = x.new_empty(len(counts) * most, *x.shape[1:])
    work = dist.all_gather_into_tensor(out, sent.contiguous(), group=find(group), async_op=True)
    if min(counts) == most:
        return work, lambda: out
    return work, lambda: torch.cat([part[:n] for part, n in zip(out.split(most), counts)])


def start_scatter(x: Tensor, counts: Sequence[int], rows: int, group: str) -> tuple[Any, Any]:
    """Begin to sum x over the ranks and to give each its rows: the work, and how to take the result."""
    import torch.distributed as dist

    most = max(counts)
    if min(counts) < most:
        padded = x.new_zeros(len(counts), most, *x.shape[1:])
        for place, part in zip(padded, x.split(list(counts))):
            place[: len(part)] = part
        x = padded.flatten(0, 1)
    out = x.new_empty(most, *x.shape[1:])
    work = dist.reduce_scatter_tensor(out, x.contiguous(), group=find(group), async_op=True)
    return work, lambda: out[:rows]


def all_to_all(x: Tensor, counts: Sequence[int], rows: int, group: str) -> Tensor:
    """What every rank has for this one's rows, (world * rows, ...), in the order of the ranks."""
    import torch.distributed as dist

    out = x.new_empty(len(counts) * rows, *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), [rows] * len(counts), list(counts), group=find(group))
    return out


def start_swap(sent: Sequence[Tensor], received: Sequence[Tensor], to: int, source: int, group: str) -> list[Any]:
    """Begin to send to one rank of the group and to receive from another."""
    import torch.distributed as dist

    pg = find(group)
    ops = [dist.P2POp(dist.isend, x, group=pg, group_peer=to) for x in sent]
    ops += [dist.P2POp(dist.irecv, x, group=pg, group_peer=source) for x in received]
    return dist.batch_isend_irecv(ops)


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


def _describe(xs: Sequence[Tensor], wanted: Sequence[bool], what: str) -> list[int]:
    words = [int.from_bytes(hashlib.blake2b(what.encode(), digest_size=7).digest(), "big"), len(xs)]
    for x, grad in zip(xs, wanted):
        shape = list(x.shape[:5])
        kind = DTYPES.index(x.dtype) if x.dtype in DTYPES else len(DTYPES)
        words += [kind, x.device.type == "cpu", grad, x.ndim, *shape, *[0] * (5 - len(shape))]
    return words[:WORDS] + [0] * (WORDS - len(words))


def _exchange(words: list[int], like: Tensor, world: int, group: str) -> Tensor:
    """What every rank describes, (world, WORDS), on the CPU."""
    import torch.distributed as dist

    device = torch.device("cpu") if has_cpu_backend(group) else like.device
    mine = torch.tensor(words, device=device)
    out = mine.new_empty(world * WORDS)
    dist.all_gather_into_tensor(out, mine, group=find(group))
    return out.view(world, WORDS).cpu()


def _compare(table: Tensor, what: str, tensors: int, uneven: bool) -> None:
    """Raise where the rows differ, with the ranks and what differs."""

    def differs(column: int) -> Counter:
        return Counter(table[:, column].tolist())

    def tell(column: int, show: Any = str) -> str:
        ranks: dict[str, list[int]] = {}
        for rank, word in enumerate(table[:, column].tolist()):
            ranks.setdefault(show(word), []).append(rank)
        return "; ".join(f"{value} on rank{'s'[: len(r) > 1]} {', '.join(map(str, r))}" for value, r in ranks.items())

    if len(differs(0)) > 1:
        own = what.split("(")[0]
        raise RuntimeError(f"the ranks call different losses or options, {own} here: {tell(0, hex)}")
    for i in range(min(tensors, MOST)):
        base = 2 + i * TENSOR_WORDS
        names = ["dtype", "device", "requires_grad", "number of dimensions"]
        shows = [lambda w: str(DTYPES[w]) if w < len(DTYPES) else "another", lambda w: "cpu" if w else "device"]
        shows += [lambda w: str(bool(w)), str]
        for offset, (label, show) in enumerate(zip(names, shows)):
            if len(differs(base + offset)) > 1:
                raise RuntimeError(
                    f"{what}: the ranks disagree on the {label} of tensor {i}: {tell(base + offset, show)}"
                )
        for axis in range(5):
            column = base + 4 + axis
            if len(differs(column)) == 1 or (axis == 0 and uneven):
                continue
            hint = "; batches of different sizes need check='step'" if axis == 0 else ""
            raise RuntimeError(
                f"{what}: the ranks disagree on the size of dimension {axis} of tensor {i}: {tell(column)}{hint}"
            )


def _agree(xs: list[Tensor], wanted: list[bool], what: str, world: int, group: str) -> Tensor:
    table = _exchange(_describe(xs, wanted, what), xs[0], world, group)
    _compare(table, what, len(xs), uneven=True)
    return table[:, 2 + 4].clone()


# The rows of each rank, (world,) int64 on the CPU. An op, so that compiled code compares too, whenever it runs.
agree = define(
    "distributed_agree(Tensor[] xs, bool[] wanted, str what, SymInt world, str group) -> Tensor",
    reference=_agree,
    fake=lambda xs, wanted, what, world, group: torch.empty(world, dtype=torch.int64),
    everywhere=True,
)

_agreed: set[Any] = set()


def agree_once(xs: Sequence[Tensor], what: str, world: int, group: str) -> None:
    """Compare what ranks bring at the first call with these shapes; their rows must be equal."""
    key = (id(find(group)), what, *((x.shape, x.dtype, x.requires_grad) for x in xs))
    if key not in _agreed:
        table = _exchange(_describe(xs, [x.requires_grad for x in xs], what), xs[0], world, group)
        _compare(table, what, len(xs), uneven=False)
        _agreed.add(key)
