# SPDX-License-Identifier: Apache-2.0
"""Models whose losses compare features over the rows of all ranks, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contract import Case
from torch import Tensor, nn

from sslkernels import losses
from sslkernels.distributed import _product

NARROW, WIDE = 6, 48  # fewer features than rows of two ranks; more than twice the rows of four


class Views(nn.Module):
    """Views through one encoder, and a loss of them."""

    def __init__(self, loss: Callable[..., Tensor], width: int) -> None:
        super().__init__()
        # a shift of a feature changes no covariance: without the curve the bias would have no gradient
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.loss = loss

    def forward(self, *views: Tensor, **options: Any) -> Tensor:
        return self.loss(*(self.encoder(view) for view in views), **options)


class TiCo(nn.Module):
    """TiCo's covariance goes from one batch to the next."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.covariance = options, None

    def forward(self, a: Tensor, b: Tensor, process_group: Any = None, strategy: Any = None) -> Tensor:
        options = {**self.options, "process_group": process_group}
        loss, self.covariance = losses.tico_loss(a, b, self.covariance, **options)
        return loss


def views(*shape: int) -> Callable[[int, torch.Generator], Sequence[Tensor]]:
    def data(n: int, generator: torch.Generator) -> Sequence[Tensor]:
        a, b = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return a, a + 0.3 * b

    return data


def case(loss: Callable[..., Any], *shape: int) -> Case:
    return Case(lambda: Views(loss, shape[-1]), views(*shape))


def frossl(*z_views: Tensor, **options: Any) -> Tensor:
    return losses.frossl_loss([*z_views, z_views[0] - 2 * z_views[1]], 0.5, **options)


def paper(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return losses.vicreg_loss(a, b, 1.0, 2.0, 3.0, variant="paper", **options)


barlow_narrow, barlow_wide = (case(losses.barlow_twins_loss, d) for d in (NARROW, WIDE))
vicreg_narrow, vicreg_wide = (case(losses.vicreg_loss, d) for d in (NARROW, WIDE))
vicreg_positions = case(paper, 2, WIDE)


def frossl_many(*z_views: Tensor, **options: Any) -> Tensor:
    """Of more views than have their rows compared."""
    return losses.frossl_loss([z_views[i % 2] + i * z_views[0] for i in range(17)], 0.5, **options)


frossl_many_narrow = case(frossl_many, NARROW)
frossl_narrow, frossl_wide = (case(frossl, d) for d in (NARROW, WIDE))
tico = Case(lambda: Views(TiCo(), NARROW), views(NARROW))
tico_through = Case(lambda: Views(TiCo(beta=0.5, through_batch=True), NARROW), views(NARROW))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "barlow_twins": losses.barlow_twins_loss,
    "vicreg": losses.vicreg_loss,
    "frossl": lambda a, b, **options: losses.frossl_loss([a, b], **options),
    "tico": lambda a, b, strategy=None, **options: losses.tico_loss(a, b, **options)[0],
}


class Sent(NamedTuple):
    name: str
    bytes: int


class Outcome(NamedTuple):
    loss: Tensor
    gradients: list[Tensor | None]  # of the own rows
    forward: list[Sent]
    backward: list[Sent]


@contextmanager
def counted() -> Iterator[list[Sent]]:
    """What this rank hands to collectives."""
    import torch.distributed as dist

    found: list[Sent] = []
    # of a collective with an output, its input comes second
    places = {"all_reduce": 0, "all_gather_into_tensor": 1, "all_gather_single": 1, "reduce_scatter_tensor": 1}
    places |= {"reduce_scatter_single": 1, "all_to_all_single": 1}
    originals = {name: getattr(dist, name) for name in [*places, "batch_isend_irecv"] if hasattr(dist, name)}

    def counts(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "batch_isend_irecv":
                sent = [op.tensor.nbytes for op in args[0] if op.op is dist.isend]
            else:
                sent = [args[places[name]].nbytes]
            found.extend(Sent(name, size) for size in sent)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counts(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def of_rows(
    group: Any,
    name: str,
    batch: Sequence[Tensor],
    sizes: Sequence[int],
    weights: Sequence[float] | None,
    panel_bytes: int,
    options: dict[str, Any],
) -> Outcome:
    """On a rank: the loss of its rows of a batch, with a weight in backward; options: those of the loss, `autocast`."""
    import torch.distributed as dist

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.pop("autocast", False))

    rank, before = dist.get_rank(group), _product.PANEL_BYTES
    own = [x.split(list(sizes))[rank].detach().requires_grad_(x.requires_grad) for x in batch]
    _product.PANEL_BYTES = panel_bytes
    try:
        with counted() as forward, autocast:
            loss = LOSSES[name](*own, process_group=group, **options)
        with counted() as backward:
            if loss.requires_grad:
                loss.backward(torch.tensor(1.0 if weights is None else weights[rank], dtype=loss.dtype))
    finally:
        _product.PANEL_BYTES = before
    return Outcome(loss.detach(), [x.grad for x in own], forward, backward)


MODULES = [
    partial(losses.BarlowTwinsLoss, gather_distributed=True),
    partial(losses.VICRegLoss, gather_distributed=True, strategy="ring"),
    partial(losses.TiCoLoss, gather_distributed=True),
]


def _own(group: Any, batch: Sequence[Tensor], sizes: Sequence[int] | None = None) -> list[Tensor]:
    import torch.distributed as dist

    rank, world = dist.get_rank(group), dist.get_world_size(group)
    rows = [len(batch[0]) // world] * world if sizes is None else list(sizes)
    return [x.split(rows)[rank].detach().requires_grad_() for x in batch]


def gathered_modules(group: Any, batch: Sequence[Tensor]) -> list[Tensor]:
    own = _own(group, batch)
    return [module()(*own).detach() for module in MODULES]


def tico_covariance(group: Any, batch: Sequence[Tensor], sizes: Sequence[int]) -> Tensor | None:
    loss_fn, own = losses.TiCoLoss(process_group=group), _own(group, batch, sizes)
    for _ in range(3):
        loss_fn(*own)
    return loss_fn.C


def lightlys_barlow_twins(group: Any, batch: Sequence[Tensor]) -> list[Tensor | None]:
    """Version 1.6 with gather_distributed=True: batch norm of the own rows, then the mean of the ranks' products."""
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_reduce

    own = _own(group, batch)
    a, b = (F.batch_norm(x, None, None, training=True) for x in own)
    c = all_reduce(a.T @ b / len(a) / dist.get_world_size(group), group=group)
    diagonal = torch.diagonal(c)
    ((diagonal - 1).square().sum() + 5e-3 * (c.square().sum() - diagonal.square().sum())).backward()
    return [x.grad for x in own]


def opcheck(group: Any, strategy: str, even: bool) -> None:
    """The same calls on every rank."""
    import torch.distributed as dist

    rank, world = dist.get_rank(group), dist.get_world_size(group)
    n = 3 if even else 2 + rank
    sizes = None if even else 2 + torch.arange(world)
    route = sizes, rank, world, strategy, group.group_name
    ops, checks = torch.ops.sslkernels, ("test_schema", "test_autograd_registration", "test_faketensor")
    for d, order in ((4, "rows"), (32, "rows"), (4, "columns"), (32, "columns")):
        shape = (n, d) if order == "rows" else (d, n)
        x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        x, y = (x, y) if order == "rows" else (x.T, y.T)
        arguments: dict[Any, tuple[Any, ...]] = {
            ops.distributed_correlation: (x, y, 5e-3, 1e-5, *route, [True, True]),
            ops.distributed_covariance: (x, y, [1.0] * 3, 1.0, 1e-4, *route, [True, True]),
            ops.distributed_frobenius: (x, None, *route, [True, False]),
            ops.distributed_shared: (x, group.group_name),
        }
        for op, given in arguments.items():
            torch.library.opcheck(op.default, given, test_utils=checks)
