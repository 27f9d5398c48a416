# SPDX-License-Identifier: Apache-2.0
"""Models whose losses are means over rows, tokens or frames, for the tests of the contract.

Of the rows UNHEARD nothing counts: with the sizes UNEVEN they are all that rank 1 has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from contract import Case, Gradients, _gradients
from torch import Tensor, nn

from sslkernels import losses
from sslkernels.distributed import Group

WIDTH, LENGTH, CLASSES = 6, 5, 7
UNHEARD = slice(3, 9)
IGNORE = -100


def _frames(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


def _mask(n: int, generator: torch.Generator) -> Tensor:
    """Two frames of each sequence, so that wav2vec 2.0 has one distractor to draw from, and the draws do not matter."""
    order = torch.rand(n, LENGTH, generator=generator).argsort(1)
    mask = order < 2
    mask[UNHEARD] = False
    return mask


def frames(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Frames, a label for each, which of them count."""
    labels = torch.randint(CLASSES, (n, LENGTH), generator=generator)
    return _frames(n, generator), labels, _mask(n, generator)


def asked(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Frames, and labels where one is asked for."""
    x, labels, mask = frames(n, generator)
    return x, labels.masked_fill(~mask, IGNORE)


class Step(nn.Module):
    """An encoder, and `loss(model, encoded, *rest, process_group=)`."""

    def __init__(self, loss: Callable[..., Tensor], **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.loss = loss
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size)))

    def forward(self, x: Tensor, *rest: Tensor, process_group: Any = None, strategy: str | None = None) -> Tensor:
        return self.loss(self, self.encoder(x), *rest, process_group=process_group)


def _case(loss: Callable[..., Tensor], data: Callable[..., Sequence[Tensor]], **sizes: tuple[int, ...]) -> Case:
    return Case(lambda: Step(loss, **sizes), data)


# regression


def two_views(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    a, b = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, a + b


def two_views_of_frames(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return _frames(n, generator), _frames(n, generator)


def _cosine(model: Step, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return losses.negative_cosine_similarity(a, model.encoder(b), dim=-1, **options)


def _named_rows(model: Step, x: Tensor, target: Tensor, ids: Tensor, **options: Any) -> Tensor:
    loss = losses.MaskedRegressionLoss(normalize_target=True, **options)
    return loss(x[:, :3], target, ids)


def _masked_rows(model: Step, x: Tensor, target: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return losses.MaskedRegressionLoss("l2", scale=3.0, **options)(x, target, mask=mask)


def _taken_rows(model: Step, x: Tensor, target: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return losses.MaskedRegressionLoss(beta=0.3, **options)(x[mask], target[mask])


def _named(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return *two_views_of_frames(n, generator), torch.randint(LENGTH, (n, 3), generator=generator)


def _masked(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return *two_views_of_frames(n, generator), _mask(n, generator)


byol = _case(lambda model, a, b, **options: losses.byol_loss(a, b, **options), two_views)
byol_of_frames = _case(lambda model, a, b, **options: losses.byol_loss(a, b, **options), two_views_of_frames)
cosine = _case(_cosine, two_views)
named_rows, masked_rows, taken_rows = (
    _case(loss, data) for loss, data in ((_named_rows, _named), (_masked_rows, _masked), (_taken_rows, _masked))
)

# tokens


def _masked_lm(model: Step, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    options = {"label_smoothing": 0.1, "z_loss": 0.01, **options}
    return losses.masked_lm_loss(x, model.weight, labels, model.bias, **options)


def _taken_tokens(model: Step, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    mask = labels != IGNORE
    return losses.masked_lm_loss(x[mask], model.weight, labels[mask], **options)


def _causal_lm(model: Step, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return losses.causal_lm_loss(x, model.weight, labels, **options)


def _next_sentence(model: Step, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return losses.next_sentence_loss(x[:, 0] @ model.weight.T, labels[:, 0].clamp(0, 1), **options)


def _hubert(model: Step, x: Tensor, labels: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return losses.hubert_loss(x, model.weight, labels, mask, temperature=model.temperature.square(), **options)


def _summed(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: loss(*args, reduction="sum", **options)


def _both_terms(*args: Any, **options: Any) -> Tensor:
    return _hubert(*args, pred_nomask_weight=0.5, **options)


words = {"weight": (CLASSES, WIDTH)}
masked_lm = _case(_masked_lm, asked, **words, bias=(CLASSES,))
masked_lm_sum = _case(_summed(_masked_lm), asked, **words, bias=(CLASSES,))
taken_tokens = _case(_taken_tokens, asked, **words)
causal_lm = _case(_causal_lm, asked, **words)
next_sentence = _case(_next_sentence, asked, weight=(2, WIDTH))
hubert = _case(_hubert, frames, **words, temperature=())
hubert_both = _case(_both_terms, frames, **words, temperature=())
hubert_sum = _case(_summed(_both_terms), frames, **words, temperature=())

# speech


def _wav2vec2(model: Step, x: Tensor, labels: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return losses.wav2vec2_loss(x, x @ model.quantizer, mask, temperature=model.temperature.square(), seed=0, **options)


def _probabilities(model: Step, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the masked frames, for two groups of codes, and the number of frames."""
    p = (x @ model.codes).unflatten(-1, (2, CLASSES)).softmax(-1)
    return torch.einsum("blgv,bl->gv", p, mask.to(p.dtype)) / mask.sum().clamp(min=1), mask.sum()


def _diversity(model: Step, x: Tensor, labels: Tensor, mask: Tensor, **options: Any) -> Tensor:
    probabilities, count = _probabilities(model, x, mask)
    return losses.diversity_loss(probabilities, count=count, **options)


def _all_terms(model: Step, x: Tensor, labels: Tensor, mask: Tensor, **options: Any) -> Tensor:
    criterion = losses.Wav2Vec2Loss(5, **options)
    return criterion(x, x @ model.quantizer, mask, _probabilities(model, x, mask)[0], x.square().mean(), seed=0)


square = {"quantizer": (WIDTH, WIDTH)}
wav2vec2 = _case(_wav2vec2, frames, **square, temperature=())
wav2vec2_sum = _case(_summed(_wav2vec2), frames, **square, temperature=())
diversity = _case(_diversity, frames, codes=(WIDTH, 2 * CLASSES))
wav2vec2_terms = _case(_all_terms, frames, **square, codes=(WIDTH, 2 * CLASSES))


class Predicted(nn.Module):
    """CPC: a context of what was, which names what comes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder, self.context = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.predictors = nn.Parameter(torch.randn(3, WIDTH, 4))
        self.options = options

    def forward(self, x: Tensor, **span: Any) -> Tensor:
        z = self.encoder(x)
        return losses.cpc_loss(self.context(z.cumsum(1)), z, self.predictors, **self.options, **span)


def sequences(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return (0.3 * _frames(n, generator),)


cpc = Case(Predicted, sequences)
cpc_sum = Case(lambda: Predicted(reduction="sum"), sequences)
cpc_sequence = Case(lambda: Predicted(negatives="sequence"), sequences)

# what a rank does besides


def without_a_count(group: Any, name: str) -> tuple[Tensor, Gradients]:
    """Of a batch in which nothing counts on any rank; of one process where there is no group."""
    case = globals()[name]
    torch.manual_seed(0)
    model = case.model()
    data = [x[UNHEARD] for x in case.data(9, torch.Generator().manual_seed(0))]
    data = [x.float() if x.is_floating_point() else x for x in data]
    loss = model(*data, process_group=group and Group(group))
    loss.backward()
    return loss.detach(), _gradients(model)


def lengths_that_change(group: Any, lengths: Sequence[Sequence[int]], check: str) -> list[Tensor]:
    """Losses of a few steps, each with sequences of another length on each rank."""
    return [
        losses.masked_lm_loss(*tokens(step, dist.get_rank(group), ranks), process_group=Group(group, check=check))
        for step, ranks in enumerate(lengths)
    ]


def tokens(step: int, rank: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels of one rank; weight is that of all."""
    weight = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    generator = torch.Generator().manual_seed(10 * step + rank)
    hidden = torch.randn(2, lengths[rank], WIDTH, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(CLASSES, (2, lengths[rank]), generator=generator)


def modules_and_functions(group: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module that holds a group, and its function with it, of a rank's own rows."""
    rank, generator = dist.get_rank(group), torch.Generator().manual_seed(dist.get_rank(group))
    x, labels, mask = frames(3 + rank, generator)
    y, weight = _frames(3 + rank, generator), tokens(0, 0, (1,))[1]
    two = x[:, 0, :2], labels[:, 0].clamp(max=1)
    cpc_module = losses.CPCLoss(WIDTH, WIDTH, 2, process_group=group, strategy="ring").double()
    cpc_module.predictors.data.fill_(0.3)
    span = {"process_group": group}
    cosine_function = partial(losses.negative_cosine_similarity, dim=2)
    cpc_function = partial(losses.cpc_loss, predictors=cpc_module.predictors)
    calls = {
        "byol": (losses.BYOLLoss(**span), losses.byol_loss, (x, y)),
        "cosine": (losses.NegativeCosineSimilarity(2, **span), cosine_function, (x, y)),
        "masked_lm": (losses.MaskedLMLoss(**span), losses.masked_lm_loss, (x, weight, labels)),
        "causal_lm": (losses.CausalLMLoss(**span), losses.causal_lm_loss, (x, weight, labels)),
        "next_sentence": (losses.NextSentenceLoss(**span), losses.next_sentence_loss, two),
        "hubert": (losses.HuBERTLoss(**span), losses.hubert_loss, (x, weight, labels, mask)),
        "cpc": (cpc_module, cpc_function, (x, y)),
    }
    return {
        name: (module(*brought).detach(), function(*brought, **span).detach())
        for name, (module, function, brought) in calls.items()
    }


def wrong_on_one_rank(group: Any, name: str) -> str:
    """The error of each rank."""
    wrong = dist.get_rank(group) == 1
    x, labels, _ = frames(4, torch.Generator().manual_seed(0))
    try:
        if name == "masked_lm":
            losses.masked_lm_loss(x, x[0], labels + CLASSES if wrong else labels.clamp(max=3), process_group=group)
        elif name == "wav2vec2_seed":
            losses.wav2vec2_loss(x, x, seed=0.5 if wrong else 1, process_group=group)  # type: ignore[arg-type]
        elif name == "wav2vec2_generator":
            options = {"seed": 1, "generator": torch.Generator() if wrong else None}
            losses.wav2vec2_loss(x, x, **options, process_group=group)
        elif name == "wav2vec2_penalty":
            losses.Wav2Vec2Loss(process_group=group)(x, x, None, None, x.mean(0 if wrong else None))
        else:
            losses.MaskedRegressionLoss(process_group=group)(x, x[:, : 3 if wrong else None])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def large_sums(group: Any) -> tuple[Tensor, Gradients]:
    """float16 tokens whose gradient of the weight is beyond that dtype's range before it is divided by their number."""
    hidden, weight = (torch.full((rows, 4), 50.0, dtype=torch.float16, requires_grad=True) for rows in (3000, 2))
    loss = losses.masked_lm_loss(hidden, weight, torch.zeros(3000, dtype=torch.int64), process_group=group)
    loss.backward()
    return loss.detach(), {"hidden": hidden.grad, "weight": weight.grad}


def cosine_of_the_rows(group: Any) -> str:
    x = torch.randn(4, 3)
    try:
        losses.negative_cosine_similarity(x, x.flip(0), dim=0, process_group=group)
    except ValueError as error:
        return str(error)
    return ""
