# SPDX-License-Identifier: Apache-2.0
"""Codebooks: the nearest code (VQ-VAE), and codes drawn by a Gumbel softmax (wav2vec 2.0), both straight-through."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels.ops.neighbors import nearest
from sslkernels.reference._precision import compute_dtype, full_precision


def _check_rows(x: Any, width: int) -> None:
    check.floating("x", x)
    if x.ndim < 2 or x.shape[-1] != width:
        raise ValueError(f"x must have shape (..., {width}), got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x must not be an empty batch, got shape {tuple(x.shape)}")


class Quantized(NamedTuple):
    """What `VectorQuantizer` returns.

    x:     (..., dim), the nearest codes; the gradient goes straight through to the input.
    ids:   (...) int64.
    loss:  scalar, to be added to the loss of the model.
    """

    x: Tensor
    ids: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """Each row becomes its nearest code.

        id_i = argmin_c |x_i - codebook_c|^2
        loss = mean((codebook_id - sg(x))^2) + commitment * mean((x - sg(codebook_id))^2)     over all elements

    With `decay` the codebook is no parameter: a code is the mean of the rows that chose it, as an exponential moving
    average over the batches in training, and the first term is left out.

        count = decay count + (1 - decay) rows of each code        total = decay total + (1 - decay) their sum
        codebook = total / count                                   counts smoothed: (count + eps) / (sum + K eps) * sum

    Args:
        num_codes: K.
        dim: width of the rows and the codes.
        commitment: weight of the term that keeps the rows near their codes.
        decay: of the averages, None for a codebook that is learned by gradient.
        eps: of the smoothing, which keeps codes that nobody chooses finite.

    Codes start uniform in +-1/K, as in VQ-VAE. Averages are of the own process; in 16 bits they would stall, so that
    the module should stay in float32, as it does under autocast.

    Source: van den Oord et al. 2017, eq. 3 and appendix A.1.

    Example:
        >>> quantizer = VectorQuantizer(32, 8)
        >>> out = quantizer(torch.randn(2, 5, 8, requires_grad=True))
        >>> out.x.shape, out.ids.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5]))
        >>> (out.x.sum() + out.loss).backward()
    """

    count: Tensor
    total: Tensor

    def __init__(
        self, num_codes: int, dim: int, commitment: float = 0.25, decay: float | None = None, *, eps: float = 1e-5
    ) -> None:
        super().__init__()
        check.integer("num_codes", num_codes, 1)
        check.integer("dim", dim, 1)
        check.in_range("commitment", commitment, 0.0, math.inf)
        check.positive("eps", eps)
        self.commitment, self.decay, self.eps = commitment, decay, eps
        codebook = torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes)
        if decay is None:
            self.codebook = nn.Parameter(codebook)
            return
        check.in_range("decay", decay, 0.0, 1.0)
        self.register_buffer("codebook", codebook)
        self.register_buffer("count", torch.ones(num_codes))
        self.register_buffer("total", codebook.clone())

    def forward(self, x: Tensor) -> Quantized:
        _check_rows(x, self.codebook.shape[1])
        rows = x.reshape(-1, x.shape[-1])
        ids = nearest(rows, self.codebook, metric="l2")[1]
        codes = F.embedding(ids, self.codebook)
        dtype = compute_dtype(rows, codes)
        distance = F.mse_loss(rows.to(dtype), codes.detach().to(dtype))
        if self.decay is None:
            loss = F.mse_loss(codes.to(dtype), rows.detach().to(dtype)) + self.commitment * distance
        else:
            loss = self.commitment * distance
            if self.training:
                self._update(rows.detach(), ids, self.decay)
        # codes + 0: their exact values, with the gradient of the rows
        straight = codes.detach().to(x.dtype) + (rows - rows.detach())
        return Quantized(straight.view(x.shape), ids.view(x.shape[:-1]), loss)

    @torch.no_grad()
    def _update(self, rows: Tensor, ids: Tensor, decay: float) -> None:
        rows = rows.to(self.total.dtype)
        # what the gradient of an embedding is, whose order of summation is fixed on every device
        sums = torch.ops.aten.embedding_dense_backward(rows, ids, self.codebook.shape[0], -1, False)
        self.count.lerp_(torch.zeros_like(self.count).index_add_(0, ids, torch.ones_like(rows[:, 0])), 1 - decay)
        self.total.lerp_(sums, 1 - decay)
        n = self.count.sum()
        smooth = (self.count + self.eps) / (n + len(self.count) * self.eps) * n
        self.codebook.copy_(self.total / smooth[:, None])

    def extra_repr(self) -> str:
        codes, dim = self.codebook.shape
        return f"num_codes={codes}, dim={dim}, commitment={self.commitment}, decay={self.decay}"


class GumbelQuantized(NamedTuple):
    """What `GumbelVectorQuantizer` returns.

    x:                (..., vq_dim), a code of each group, one after the other.
    ids:              (..., groups) int64, the codes taken: in training those that the noise chose.
    probabilities:    (groups, num_vars), the mean over the frames of softmax(logits), without noise and temperature:
                      what `diversity_loss` takes. 0 where no frame is masked.
    code_perplexity:  sum over groups of exp(entropy) of how often each code has the largest logit, detached.
    prob_perplexity:  sum over groups of exp(entropy) of `probabilities`, detached.
    """

    x: Tensor
    ids: Tensor
    probabilities: Tensor
    code_perplexity: Tensor
    prob_perplexity: Tensor


class GumbelVectorQuantizer(nn.Module):
    """Product quantization by a hard Gumbel softmax: each group takes one of its codes, straight-through.

        logits = weight_proj(x)                                         (..., groups, num_vars)
        y      = softmax((logits + noise) / curr_temp)                  float32; noise = -log(-log(U(0, 1)))
        x_g    = vars[argmax y_g]                                       with the gradient of y_g @ vars
        x_g    = vars[argmax logits_g]                                  in eval, without a gradient for the logits

    Parameters are named, shaped and initialised as fairseq's: `vars` (1, groups * num_vars, vq_dim / groups) from
    U(0, 1), `weight_proj.weight` from N(0, 1), its bias 0. The values are exactly the codes, so that two frames of one
    code are equal: a distractor equal to the target does not count in `wav2vec2_loss`.

    Args:
        dim: of the input.
        num_vars: codes of a group.
        temp: (start, end, decay): `set_num_updates(n)` makes curr_temp = max(start * decay^n, end).
        groups: codes of a frame.
        combine_groups: all groups share one codebook.
        vq_dim: of the output.

    `forward(x, mask=None, *, generator=None)`: the statistics are over the frames where mask (...) is True. curr_temp
    is a number and not in the `state_dict`: call `set_num_updates` after loading a checkpoint.

    Source: Baevski et al. 2020, section 2; fairseq `modules/gumbel_vector_quantizer.py`.

    Example:
        >>> quantizer = GumbelVectorQuantizer(16, num_vars=8, groups=2, vq_dim=12)
        >>> out = quantizer(torch.randn(2, 5, 16))
        >>> out.x.shape, out.ids.shape, out.probabilities.shape
        (torch.Size([2, 5, 12]), torch.Size([2, 5, 2]), torch.Size([2, 8]))
    """

    def __init__(
        self,
        dim: int,
        num_vars: int = 320,
        temp: tuple[float, float, float] = (2.0, 0.5, 0.999995),
        groups: int = 2,
        combine_groups: bool = False,
        vq_dim: int = 256,
    ) -> None:
        super().__init__()
        for name, x in (("dim", dim), ("num_vars", num_vars), ("groups", groups), ("vq_dim", vq_dim)):
            check.integer(name, x, 1)
        if vq_dim % groups:
            raise ValueError(f"vq_dim must be a multiple of groups ({groups}), got {vq_dim}")
        if len(temp) != 3:
            raise ValueError(f"temp must be (start, end, decay), got {temp!r}")
        for i, number in enumerate(temp):
            check.positive(f"temp[{i}]", number)
        self.num_vars, self.groups, self.combine_groups = num_vars, groups, combine_groups
        self.max_temp, self.min_temp, self.temp_decay = temp
        self.curr_temp = self.max_temp
        self.vars = nn.Parameter(torch.rand(1, num_vars * (1 if combine_groups else groups), vq_dim // groups))
        self.weight_proj = nn.Linear(dim, groups * num_vars)
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def set_num_updates(self, num_updates: int) -> None:
        self.curr_temp = max(self.max_temp * self.temp_decay**num_updates, self.min_temp)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> GumbelQuantized:
        _check_rows(x, self.weight_proj.in_features)
        check.mask(mask, x.shape[:-1], x)
        logits = self.weight_proj(x.flatten(0, -2))
        dtype = logits.dtype
        logits = logits.to(compute_dtype(logits)).view(-1, self.groups, self.num_vars)  # (N, G, V)
        best = logits.argmax(-1)
        ids = best
        if self.training:
            noise = -torch.empty_like(logits).exponential_(generator=generator).log()
            soft = ((logits + noise) / self.curr_temp).softmax(-1)
            ids = soft.detach().argmax(-1)
        hard = self._one_hot(ids, logits)
        if self.training:
            hard = hard + (soft - soft.detach())  # + 0: the sum below is exactly a code
        codes = self.vars.view(-1, self.num_vars, self.vars.shape[-1]).expand(self.groups, -1, -1)  # (G, V, d)
        shape, count = x.shape[:-1], logits.shape[0]
        if mask is None:
            weight = logits.new_full((count,), 1 / count)
        else:
            weight = mask.flatten() / mask.sum().clamp(min=1).to(logits.dtype)
        with full_precision(x):
            out = torch.bmm(hard.transpose(0, 1), codes.to(hard.dtype)).transpose(0, 1)  # (N, G, d)
            probabilities = torch.einsum("n,ngv->gv", weight, logits.softmax(-1))
            usage = torch.einsum("n,ngv->gv", weight, self._one_hot(best, logits))
        return GumbelQuantized(
            out.reshape(*shape, -1).to(dtype),
            ids.view(*shape, self.groups),
            probabilities,
            _perplexity(usage),
            _perplexity(probabilities.detach()),
        )

    def _one_hot(self, ids: Tensor, like: Tensor) -> Tensor:
        return (ids[..., None] == torch.arange(self.num_vars, device=ids.device)).to(like.dtype)

    def extra_repr(self) -> str:
        temp = (self.max_temp, self.min_temp, self.temp_decay)
        return f"num_vars={self.num_vars}, groups={self.groups}, combine_groups={self.combine_groups}, temp={temp}"


def _perplexity(p: Tensor) -> Tensor:
    return torch.exp(-(p * torch.log(p + 1e-7)).sum(-1)).sum()
