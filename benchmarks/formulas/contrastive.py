# SPDX-License-Identifier: Apache-2.0
"""Published formulas of the contrastive losses, written out; run in float64 they judge every contender.

They share no code with the library or with the contenders.
"""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def nt_xent(out0: Tensor, out1: Tensor, temperature: float) -> Tensor:
    """mean over the 2N rows of log sum_{j != i} exp(s_ij) - s_i,partner(i); s = z z^T / temperature."""
    n = out0.shape[0]
    z = torch.cat([unit(out0), unit(out1)])  # (2N, D)
    s = z @ z.T / temperature
    s.fill_diagonal_(-torch.inf)
    rows = torch.arange(2 * n)
    return (s.logsumexp(1) - s[rows, (rows + n) % (2 * n)]).mean()


def info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """mean over rows of log sum_j exp(s_ij) - s_ii."""
    s = unit(query) @ unit(key).T / temperature
    return (s.logsumexp(1) - s.diagonal()).mean()


def moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """mean over rows of log(exp(p_i) + sum_j exp(s_ij)) - p_i; p the key's logit, s the queue's."""
    q = unit(query)
    p = (q * unit(key)).sum(1) / temperature
    s = q @ queue.T / temperature
    return (torch.logaddexp(p, s.logsumexp(1)) - p).mean()


def clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """(mean_i [lse_j s_ij - s_ii] + mean_j [lse_i s_ij - s_jj]) / 2."""
    s = logit_scale * (image @ text.T)
    return ((s.logsumexp(1) - s.diagonal()).mean() + (s.logsumexp(0) - s.diagonal()).mean()) / 2


def siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """sum_ij log(1 + exp(-m_ij s_ij)) / N; m = +1 on the diagonal, -1 elsewhere."""
    s = logit_scale * (image @ text.T) + logit_bias
    sign = 1 - 2 * torch.eye(len(s), dtype=s.dtype)
    return torch.nn.functional.softplus(sign * s).sum() / len(s)


def supcon(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """mean over rows i with a positive of lse_{j != i} s_ij - mean_{p in P(i)} s_ip."""
    z = unit(features)
    s = z @ z.T / temperature
    self_pair = torch.eye(len(z), dtype=torch.bool)
    positives = (labels[:, None] == labels[None, :]) & ~self_pair
    count = positives.sum(1)
    positive_mean = torch.where(positives, s, 0).sum(1) / count.clamp(min=1)
    losses = s.masked_fill(self_pair, -torch.inf).logsumexp(1) - positive_mean
    return losses[count > 0].mean()
