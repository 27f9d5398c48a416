# SPDX-License-Identifier: Apache-2.0
"""A linear classifier on frozen features: exact ridge regression, logistic regression, or trained by SGD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.evaluation._labelled import train_and_test
from sslkernels.evaluation.linear import LinearProbe

L2 = tuple(10.0**e for e in range(1, -7, -1))  # from the strongest: each fit starts where the last one ended
HELD_OUT = 5  # one training item in so many chooses among fits
ITERATIONS = 1000


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classifier: str = "ridge",
    ridge: float = 1e-2,
    l2: float | Sequence[float] = L2,
    epochs: int = 100,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> float:
    """Share of test items that a linear classifier, fitted to the training items, names rightly.

        x = (features - mean) / std                 per dimension, over the training items, as MAE's batch norm does
        class = argmax(x W + c), where W, c are
        "ridge":     argmin mean |x W + c - onehot|^2 + ridge |W|^2
        "logistic":  argmin mean cross_entropy(x W + c, label) + l2 / 2 |W|^2
        "sgd":       `LinearProbe`, for `epochs` epochs

    Ridge is solved exactly, in float64: no learning rate and no epochs, so two features are compared under equal terms.
    Logistic regression, CLIP's protocol, is fitted by L-BFGS in float64; among several `l2` that one is taken, and
    fitted again to all training items, which is best on a fifth of them. The same fifth chooses among the learning
    rates of SGD. Test items choose nothing.

    Source: Radford et al. 2021, A.3, for logistic regression with a swept penalty (there after a validation set);
    scikit-learn's `LogisticRegression(C=1 / (l2 N))` is the same problem.

    Args:
        train_features, test_features: (N, D) and (M, D); need not be normalized.
        train_labels, test_labels: (N,) and (M,), int64 class numbers from 0.
        classifier: "ridge", "logistic" or "sgd".
        ridge: penalty of "ridge".
        l2: penalty of "logistic", or several.
        epochs, batch_size: of "sgd".
        generator: of the items that choose and of the order of the batches, by default always the same.

    Raises:
        ValueError, TypeError: features or labels of another shape, dtype or device, or empty; an option out of range;
            a fifth to be held out of fewer than 5 training items.

    Example:
        >>> train, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
        >>> linear_probe(train, labels, torch.eye(3), torch.arange(3))
        1.0
    """
    train_and_test(train_features, train_labels, test_features, test_labels)
    check.choice("classifier", classifier, ("ridge", "logistic", "sgd"))
    check.positive("ridge", ridge)
    penalties = tuple(l2) if isinstance(l2, Sequence) else (l2,)
    if not penalties:
        raise ValueError("l2 must be a number or several, got none")
    for penalty in penalties:
        check.positive("l2", penalty)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    if classifier == "sgd":
        return _sgd(train_features, train_labels, test_features, test_labels, epochs, batch_size, generator)

    train, test = train_features.double(), test_features.double()
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1)
    train, test = (train - mean) / std, (test - mean) / std
    if classifier == "ridge":
        weight, bias = _ridge(train, train_labels, ridge)
    else:
        weight, bias = _logistic(train, train_labels, penalties, generator)
    return float(((test @ weight + bias).argmax(dim=1) == test_labels).double().mean())


def _ridge(x: Tensor, labels: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    onehot = F.one_hot(labels).to(x.dtype)
    share = onehot.mean(dim=0)  # the intercept, as the training features are centred
    n, d = x.shape
    if d <= n:
        gram = x.T @ x + n * ridge * torch.eye(d, dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ (onehot - share))
    else:
        gram = x @ x.T + n * ridge * torch.eye(n, dtype=x.dtype, device=x.device)
        weight = x.T @ torch.linalg.solve(gram, onehot - share)
    return weight, share


def _logistic(
    x: Tensor, labels: Tensor, penalties: Sequence[float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    classes = int(labels.max()) + 1
    start = x.new_zeros(x.shape[1] + 1, classes)
    if len(penalties) == 1:
        fitted = _minimize(start, x, labels, penalties[0])
        return fitted[:-1], fitted[-1]
    fit, held = _hold_out(len(x), generator, x.device)
    best, most = penalties[0], -1.0
    for penalty in sorted(penalties, reverse=True):
        start = _minimize(start, x[fit], labels[fit], penalty)
        right = float((_scores(start, x[held]).argmax(dim=1) == labels[held]).double().mean())
        if right > most:  # equals go to the stronger penalty
            best, most, at_best = penalty, right, start
    fitted = _minimize(at_best, x, labels, best)
    return fitted[:-1], fitted[-1]


def _scores(weight: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(weight[-1], x, weight[:-1])


@torch.enable_grad()
def _minimize(start: Tensor, x: Tensor, labels: Tensor, l2: float) -> Tensor:
    """Weight and, in the last row, intercept (D + 1, C) of logistic regression, by L-BFGS."""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_scores(weight, x), labels) + 0.5 * l2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def _hold_out(n: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the items to fit and of those to choose by."""
    if n < HELD_OUT:
        raise ValueError(f"train_features must be at least {HELD_OUT} items, of which one chooses, got {n}")
    order = torch.randperm(n, generator=generator).to(device)
    return order[n // HELD_OUT :], order[: n // HELD_OUT]


def _sgd(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, epochs: int, batch_size: int, generator: torch.Generator
) -> float:
    check.integer("epochs", epochs, 1)
    check.integer("batch_size", batch_size, 1)
    fit, held = _hold_out(len(train), generator, train.device)
    size = min(batch_size, len(fit))
    steps = epochs * (len(fit) // size)
    probe = LinearProbe(train.shape[1], int(labels.max()) + 1, total_steps=steps, batch_size=size, generator=generator)
    probe.to(train.device)
    for _ in range(epochs):
        order = fit[torch.randperm(len(fit), generator=generator).to(fit.device)]
        for some in order[: len(fit) // size * size].split(size):
            probe.step(train[some], labels[some])
    probe.select(train[held], labels[held])
    return probe.accuracy(test, truth)
