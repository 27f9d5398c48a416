# SPDX-License-Identifier: Apache-2.0
"""What the loss modules share: their options, and what their repr says."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels.distributed import STRATEGIES, Group
from sslkernels.losses import _common as common


class Loss(nn.Module):
    def __init__(self, temperature: nn.Parameter | float | None = None, **options: Any) -> None:
        super().__init__()
        self.span: dict[str, Any] = {}  # process_group and strategy, of a loss that looks beyond the own process
        if temperature is not None:
            if not isinstance(temperature, Tensor):
                check.positive("temperature", temperature)
            elif not isinstance(temperature, nn.Parameter):
                raise TypeError("temperature must be a number, or an nn.Parameter to be learned, got a plain tensor")
            self.temperature = temperature
        known = ("reduction", "label_smoothing", "beta", "tau_plus")
        common.check_options(**{name: x for name, x in options.items() if name in known})
        self.options = options

    def extra_repr(self) -> str:
        shown = dict(self.options)
        if hasattr(self, "temperature"):
            learned = isinstance(self.temperature, Tensor)
            shown = {"temperature": "learned" if learned else self.temperature, **shown}
        return ", ".join([*(f"{name}={x}" for name, x in shown.items()), *shown_span(self.span)])


def spanning(gather_distributed: bool, process_group: Any, strategy: str | None) -> dict[str, Any]:
    """process_group and strategy for a loss's function; lightly's `gather_distributed=True` is all ranks there are."""
    if process_group is None and gather_distributed:
        process_group = "world"
    if strategy is not None:
        check.choice("strategy", strategy, STRATEGIES)
    return {"process_group": process_group, "strategy": strategy}


def shown_span(span: dict[str, Any]) -> list[str]:
    """What the repr of a loss says of the processes it spans: nothing for one."""
    if span.get("process_group") is None:
        return []
    name, strategy = span["process_group"], span.get("strategy")
    shown = name if isinstance(name, str | Group) else getattr(name, "group_name", name)
    return [f"process_group={shown}"] + [f"strategy={strategy}"] * (strategy is not None)
