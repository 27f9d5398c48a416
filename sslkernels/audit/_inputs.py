# SPDX-License-Identifier: Apache-2.0
"""What a loss under audit is called with: rows of random data, and the features of a small shared encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """The parameters that the ranks share: a linear map (dim, dim), and a log scale and bias for image and text."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))
        self.features: list[Tensor] = []  # of this step, whose gradients are looked at

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        out.retain_grad()
        self.features.append(out)
        return out

    def unit(self, x: Tensor) -> Tensor:
        return F.normalize(self(x), dim=1)


class Inputs(NamedTuple):
    """What to call a loss with.

    data(rows, dim, generator) is tensors with so many rows, which the ranks share out; call(loss, encoder, *rows) is
    the loss of some of them.
    """

    data: Callable[[int, int, torch.Generator], Sequence[Tensor]]
    call: Callable[..., Any]


def _pair(rows: int, dim: int, generator: torch.Generator) -> Sequence[Tensor]:
    a = torch.randn(rows, dim, generator=generator)
    return a, a + 0.5 * torch.randn(rows, dim, generator=generator)


def _labelled(rows: int, dim: int, generator: torch.Generator) -> Sequence[Tensor]:
    return torch.randn(rows, dim, generator=generator), torch.randint(3, (rows,), generator=generator)


def _views(loss: Any, encoder: Encoder, a: Tensor, b: Tensor) -> Any:
    return loss(encoder(a), encoder(b))


def _rows(loss: Any, encoder: Encoder, a: Tensor, b: Tensor) -> Any:
    return loss(encoder(a))


def _list(loss: Any, encoder: Encoder, a: Tensor, b: Tensor) -> Any:
    return loss([encoder(a), encoder(b)])


def _labels(loss: Any, encoder: Encoder, a: Tensor, labels: Tensor) -> Any:
    return loss(encoder(a), labels)


def _image_text(loss: Any, encoder: Encoder, a: Tensor, b: Tensor) -> Any:
    return loss(encoder.unit(a), encoder.unit(b), encoder.logit_scale.exp())


def _image_text_bias(loss: Any, encoder: Encoder, a: Tensor, b: Tensor) -> Any:
    return loss(encoder.unit(a), encoder.unit(b), encoder.logit_scale.exp(), encoder.logit_bias)


def _swav(loss: Any, encoder: Encoder, a: Tensor, b: Tensor) -> Any:
    return loss([F.normalize(encoder(a), dim=1), F.normalize(encoder(b), dim=1)], [])


def _dino(loss: Any, encoder: Encoder, a: Tensor, b: Tensor) -> Any:
    student = [encoder(a), encoder(b)]
    return loss([2 * x.detach() for x in student], student)


INPUTS = {
    "views": Inputs(_pair, _views),  # loss(features, features)
    "rows": Inputs(_pair, _rows),  # loss(features)
    "list": Inputs(_pair, _list),  # loss([features, features])
    "labels": Inputs(_labelled, _labels),  # loss(features, labels)
    "image_text": Inputs(_pair, _image_text),  # loss(unit features, unit features, scale)
    "image_text_bias": Inputs(_pair, _image_text_bias),  # the same and a bias
    "swav": Inputs(_pair, _swav),  # loss([features, features], [])
    "dino": Inputs(_pair, _dino),  # loss(teacher's [outputs, outputs], student's)
}


def guess(loss: Callable[..., Any]) -> str:
    """The kind of inputs that the names of a loss's arguments tell of."""
    parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    told = {"logit_bias": "image_text_bias", "logit_scale": "image_text", "teacher_out": "dino", "z_views": "list"}
    for name, kind in {**told, "high_resolution_outputs": "swav", "labels": "labels"}.items():
        if name in required or (name == "labels" and name in parameters):
            return kind
    return "rows" if len(required) == 1 else "views"
