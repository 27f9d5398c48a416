# SPDX-License-Identifier: Apache-2.0
"""SigLIP, and losses over frozen keys, for the tests of the contract; and their ops, with every kind of exclusion."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import distributed_cases as cases
import torch
import torch.distributed as dist
from contract import Case
from distributed_cases import Table, TwoTowers, TwoViews, ids, own_share, two_views, weighted, with_stats
from torch import Tensor

from sslkernels import distributed, losses
from sslkernels.distributed import _collectives as collectives
from sslkernels.distributed import contrastive as spread
from sslkernels.ops.contrastive import Exclude


def frozen(loss: Callable[..., Tensor], first: bool = False, second: bool = True) -> Callable[..., Tensor]:
    """Features of one side, or of both, without gradient."""
    return lambda a, b, *args, **rest: loss(a.detach() if first else a, b.detach() if second else b, *args, **rest)


def weight_learned(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    options["sample_weight"] = image[:, 0].sigmoid()
    return losses.siglip_loss(image, text, scale, bias, **options)


tilted = partial(losses.siglip_loss, logit_scale=0.4, logit_bias=-0.2)

siglip = Case(lambda: TwoTowers(losses.siglip_loss), two_views)
siglip_smooth = Case(lambda: TwoTowers(partial(losses.siglip_loss, label_smoothing=0.2)), two_views)
siglip_weighted = Case(lambda: TwoTowers(losses.siglip_loss), weighted)
siglip_learned = Case(lambda: TwoTowers(weight_learned), two_views)
siglip_rows = Case(lambda: TwoTowers(own_share(losses.siglip_loss)), two_views)
siglip_stats = Case(lambda: TwoTowers(with_stats(losses.siglip_loss, reduction="sum")), two_views)
siglip_strided = Case(lambda: TwoTowers(cases.strided(losses.siglip_loss)), two_views)
siglip_frozen_texts = Case(lambda: TwoViews(frozen(tilted)), two_views)
siglip_frozen_images = Case(lambda: TwoViews(frozen(tilted, True, False)), two_views)
siglip_table = Case(lambda: Table(tilted), ids)
siglip_autocast = Case(lambda: Table(cases.autocast(tilted)), ids)

info_nce = frozen(losses.info_nce)
frozen_keys = Case(lambda: TwoViews(info_nce, 0.3), two_views)
frozen_keys_smooth = Case(lambda: TwoViews(partial(info_nce, label_smoothing=0.2), 0.3), two_views)
frozen_keys_hard = Case(lambda: TwoViews(partial(info_nce, beta=0.5, tau_plus=0.05), 0.3), two_views)
frozen_keys_weighted = Case(lambda: TwoViews(cases.sample_weighted(info_nce, learned=True), 0.3), weighted)
frozen_keys_and_queue = Case(lambda: TwoViews(cases.queue(info_nce, in_batch=True), 0.3), two_views)
frozen_keys_table = Case(lambda: Table(frozen(partial(losses.info_nce, temperature=0.5))), ids)


def backward_alone(group: Any, name: str, strategy: str) -> list[str]:
    """What backward asks the group for: the error of the first exchange in it."""
    a, b = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    span: dict[str, Any] = {"process_group": group, "strategy": strategy}
    shard: dict[str, Any] = {"negative_keys": torch.randn(5, 6), "sharded_negatives": True}
    calls: dict[str, Any] = {
        "siglip": lambda: tilted(a, b, **span),
        "rows of siglip": lambda: tilted(a, b, reduction="none", **span).sum(),
        "frozen keys": lambda: losses.info_nce(a, b.detach(), **span),
        "shards": lambda: losses.info_nce(a, b, **shard, **span),
    }
    loss, guard = calls[name](), collectives.guard
    try:
        collectives.guard = _no_exchange
        loss.backward()
    except ConnectionError as error:
        return [str(error)]
    finally:
        collectives.guard = guard
        dist.barrier(group)
    return []


def _no_exchange(*args: Any) -> Any:
    raise ConnectionError("an exchange")


def excluding(kind: str, n: int, r: slice) -> Exclude:
    """Of the own rows r; the last query has no key at all, and one rank's keys are all masked."""
    labels = torch.arange(n) % 3
    labels[-1] = 9
    mask = torch.ones(n, dtype=torch.bool)
    mask[: n // 2] = False
    return {
        "nothing": Exclude(),
        "diagonal": Exclude(diagonal=0),
        "labels": Exclude(query_groups=labels[r], key_groups=labels[r]),
        "other labels": Exclude(0, None, labels[r], labels[r], None, True),
        "masked": Exclude(key_mask=mask[r]),
    }[kind]


def swept(group: Any, kind: str, strategy: str, sizes: list[int]) -> list[Tensor]:
    """Log-sum-exps and maxima over frozen keys, softplus rows, and gradients: of the own rows, or of all alone."""
    generator = torch.Generator().manual_seed(0)
    q, k, grad = (torch.randn(sum(sizes), d, generator=generator, dtype=torch.float64) for d in (4, 4, 2))
    r = slice(None)
    if group is not None:
        start = sum(sizes[: dist.get_rank(group)])
        r = slice(start, start + sizes[dist.get_rank(group)])
    q, k, grad = q[r].clone().requires_grad_(), k[r].clone(), grad[r]
    exclude = excluding(kind, sum(sizes), r)
    batch = distributed.batch(group, strategy, "swept", q=q, k=k)
    row, _, top = spread.similarity_logsumexp(batch, q, k, 0.7, exclude, columns=False, return_max=True)
    (dq,) = torch.autograd.grad(row.masked_fill(row == -torch.inf, 0.0), q, grad[:, 0])
    k.requires_grad_()
    rows = spread.similarity_softplus(batch, q, k, 0.7, -0.3, exclude)
    gradients = torch.autograd.grad(rows, [q, k], grad[:, 1])
    total = spread.similarity_softplus_sum(batch, q, k, 0.7, -0.3, weight=grad[:, 1], exclude=exclude)
    emitted = torch.autograd.grad(total, [q, k])
    with torch.no_grad():
        assert torch.allclose((rows * grad[:, 1]).sum(), total)
        again, _ = spread.similarity_logsumexp(batch, q, k, 0.7, exclude, columns=False)
        assert torch.allclose(again, row)
    return [row.detach(), top, dq, rows.detach(), *gradients, *emitted]
