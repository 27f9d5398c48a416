# SPDX-License-Identifier: Apache-2.0
"""The losses that decorrelate features, as modules; each is its function of the same name, which is the definition.

Names, arguments and defaults are lightly's. All compute in float32 at least, under autocast as well. Statistics are of
the batch at hand, or with `gather_distributed=True` of the batches of all ranks; lightly's are then still of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses._correlation import (
    barlow_twins_loss,
    check_tico,
    check_vicreg,
    check_weight,
    frossl_loss,
    tico_loss,
    vicreg_loss,
)
from sslkernels.losses._module import shown_span, spanning

__all__ = [
    "BarlowTwinsLoss",
    "FroSSLLoss",
    "TiCoLoss",
    "VICRegLoss",
    "barlow_twins_loss",
    "frossl_loss",
    "tico_loss",
    "vicreg_loss",
]


class _CorrelationLoss(nn.Module):
    """Holds the options of its function under their own names, so that a schedule may change them."""

    options: tuple[str, ...]
    span: dict[str, Any]  # process_group, and strategy where there is one

    def extra_repr(self) -> str:
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in self.options), *shown_span(self.span)])


class BarlowTwinsLoss(_CorrelationLoss):
    """`barlow_twins_loss` as a module, as lightly's class of this name.

    Args:
        lambda_param: weight of the redundancy.
        gather_distributed: the batch is that of all ranks; `process_group`, of those of a group.
        process_group, strategy: as in `barlow_twins_loss`.

    Example:
        >>> loss = BarlowTwinsLoss()(torch.randn(8, 16), torch.randn(8, 16))
    """

    options = ("lambda_param",)

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool = False,
        *,
        process_group: Any = None,
        strategy: str | None = None,
    ) -> None:
        super().__init__()
        self.span = spanning(gather_distributed, process_group, strategy)
        check_weight("lambda_param", lambda_param)
        self.lambda_param = lambda_param

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return barlow_twins_loss(z_a, z_b, self.lambda_param, **self.span)


class VICRegLoss(_CorrelationLoss):
    """`vicreg_loss` as a module, as lightly's class of this name.

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        gather_distributed: the batch is that of all ranks; `process_group`, of those of a group.
        eps: added to the variance.
        variant: "code" or "paper", as in `vicreg_loss`.
        process_group, strategy: as in `barlow_twins_loss`.

    Example:
        >>> loss = VICRegLoss()(torch.randn(8, 16), torch.randn(8, 16))
    """

    options = ("lambda_param", "mu_param", "nu_param", "eps", "variant")

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
        *,
        variant: str = "code",
        process_group: Any = None,
        strategy: str | None = None,
    ) -> None:
        super().__init__()
        self.span = spanning(gather_distributed, process_group, strategy)
        check_vicreg(lambda_param, mu_param, nu_param, eps, variant)
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param
        self.eps, self.variant = eps, variant

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        weights = self.lambda_param, self.mu_param, self.nu_param
        return vicreg_loss(z_a, z_b, *weights, self.eps, variant=self.variant, **self.span)


class TiCoLoss(_CorrelationLoss):
    """`tico_loss` as a module that keeps the covariance, as lightly's class of this name.

    Args:
        beta: how much of the covariance stays.
        rho: weight of the covariance.
        gather_distributed: the batch is that of all ranks; `process_group`, of those of a group.
        through_batch: as in `tico_loss`.

    Buffers:
        C: (D, D), float32 (float64 from float64 features); from the first batch on. It is in the `state_dict`, and a
            module that has seen no batch takes it from there; lightly's, an attribute, is not.

    Example:
        >>> loss_fn = TiCoLoss()
        >>> loss = loss_fn(torch.randn(8, 16), torch.randn(8, 16))
        >>> validation = loss_fn(torch.randn(8, 16), torch.randn(8, 16), update_covariance_matrix=False)
    """

    options = ("beta", "rho", "through_batch")
    C: Tensor | None

    def __init__(
        self,
        beta: float = 0.9,
        rho: float = 8.0,
        gather_distributed: bool = False,
        *,
        through_batch: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.span = {"process_group": spanning(gather_distributed, process_group, None)["process_group"]}
        check_tico(beta, rho)
        self.beta, self.rho, self.through_batch = beta, rho, through_batch
        self.register_buffer("C", None)

    def forward(self, z_a: Tensor, z_b: Tensor, update_covariance_matrix: bool = True) -> Tensor:
        options = {"through_batch": self.through_batch, **self.span}
        loss, covariance = tico_loss(z_a, z_b, self.C, self.beta, self.rho, **options)
        if update_covariance_matrix:
            self.C = covariance
        return loss

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}C")
        if self.C is None and saved is not None:
            self.C = torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FroSSLLoss(_CorrelationLoss):
    """`frossl_loss` as a module, as lightly's class of this name.

    Args:
        invariance_weight: weight of the second term.
        process_group, strategy: as in `frossl_loss`.

    Example:
        >>> loss = FroSSLLoss()([torch.randn(8, 16) for _ in range(3)])
    """

    options = ("invariance_weight",)

    def __init__(
        self, invariance_weight: float = 1.0, *, process_group: Any = None, strategy: str | None = None
    ) -> None:
        super().__init__()
        self.span = spanning(False, process_group, strategy)
        check_weight("invariance_weight", invariance_weight)
        self.invariance_weight = invariance_weight

    def forward(self, z_views: Sequence[Tensor]) -> Tensor:
        return frossl_loss(z_views, self.invariance_weight, **self.span)
