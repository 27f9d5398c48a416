# SPDX-License-Identifier: Apache-2.0
"""Contrastive contenders: what named peers ship, restated here in our own words, and our algebra in plain torch.

A restatement keeps the peer's sequence of tensor operations (what is materialised, masked, copied), which is what
costs time and memory. `--peers` compares it with the real package. "lean" is what a clever user would write.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender, Inputs

# --- NT-Xent ---------------------------------------------------------------------------------------------------


def lightly_nt_xent(out0: Tensor, out1: Tensor, temperature: float) -> Tensor:
    a, b = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    n = len(a)
    own = torch.eye(n, dtype=torch.bool, device=out0.device)
    aa, ab, ba, bb = (torch.einsum("nc,mc->nm", x, y) / temperature for x, y in ((a, a), (a, b), (b, a), (b, b)))
    aa = aa[~own].view(n, -1)  # (N, N - 1): the self pairs are cut out by a boolean gather
    bb = bb[~own].view(n, -1)
    upper = torch.cat([ab, aa], dim=1)
    lower = torch.cat([ba, bb], dim=1)
    logits = torch.cat([upper, lower], dim=0)  # (2N, 2N - 1)
    return F.cross_entropy(logits, torch.arange(n, device=logits.device).repeat(2))


def solo_nt_xent(out0: Tensor, out1: Tensor, temperature: float) -> Tensor:
    z = F.normalize(torch.cat([out0, out1]), dim=-1)
    index = torch.arange(len(out0), device=out0.device).repeat(2)[None]
    weights = torch.exp(torch.einsum("if,jf->ij", z, z) / temperature)
    same = index.t() == index
    same.fill_diagonal_(0)
    other = index.t() != index
    positive = (weights * same).sum(1)
    negative = (weights * other).sum(1)
    return -torch.log(positive / (positive + negative)).mean()


def lean_nt_xent(out0: Tensor, out1: Tensor, temperature: float) -> Tensor:
    n = len(out0)
    z = F.normalize(torch.cat([out0, out1]), dim=1)
    logits = (z / temperature) @ z.t()
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=logits.device).roll(n))


def ours_nt_xent(out0: Tensor, out1: Tensor, temperature: float) -> Tensor:
    from sslkernels.losses import nt_xent

    return nt_xent(out0, out1, temperature=temperature)


# --- InfoNCE with in-batch negatives, and with a queue -----------------------------------------------------------


def info_nce_in_batch(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
    return F.cross_entropy(logits / temperature, torch.arange(len(query), device=query.device))


def lean_info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    logits = (F.normalize(query, dim=1) / temperature) @ F.normalize(key, dim=1).t()
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def ours_info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    from sslkernels.losses import info_nce

    return info_nce(query, key, temperature=temperature)


def columns(inputs: Inputs) -> Inputs:
    """MoCo keeps its queue as (D, K)."""
    return {**inputs, "queue": inputs["queue"].t().contiguous()}


def moco_builder(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    q = F.normalize(query, dim=1)
    with torch.no_grad():
        k = F.normalize(key, dim=1)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, queue.clone().detach())  # the clone lets the queue change before backward
    logits = torch.cat([positive, negative], dim=1)
    logits /= temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def info_nce_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    q, k, negatives = F.normalize(query, dim=-1), F.normalize(key, dim=-1), F.normalize(queue, dim=-1)
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ negatives.transpose(-2, -1)], dim=1)
    return F.cross_entropy(logits / temperature, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def lean_moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    q = F.normalize(query, dim=1) / temperature
    positive = (q * F.normalize(key, dim=1)).sum(1)
    return F.softplus((q @ queue.t()).logsumexp(1) - positive).mean()


def ours_moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    from sslkernels.losses import info_nce

    # As in builder.py the queue holds unit rows, so only the batch is normalised.
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return info_nce(query, key, queue, temperature=temperature, normalize=False)


# --- CLIP and SigLIP ---------------------------------------------------------------------------------------------


def open_clip_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T  # a second GEMM, not the transpose
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def lean_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    logits = (logit_scale * image) @ text.t()
    return (logits.logsumexp(1) + logits.logsumexp(0)).mean() / 2 - logits.diagonal().mean()


def ours_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    from sslkernels.losses import clip_loss

    return clip_loss(image, text, logit_scale)


def open_clip_siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    logits = logit_scale * image @ text.T
    logits += logit_bias
    sign = -torch.ones_like(logits)
    sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) + sign
    return -F.logsigmoid(sign * logits).sum() / len(image)


def open_clip_siglip_chunked(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk: int = 1024
) -> Tensor:
    total = torch.zeros((), device=image.device)
    for start in range(0, len(image), chunk):
        logits = logit_scale * image[start : start + chunk] @ text.T
        logits += logit_bias
        rows = torch.arange(len(logits), device=logits.device)
        total = total + (F.softplus(logits).sum() - logits[rows, start + rows].sum())
    return total / len(image)


def lean_siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    logits = torch.addmm(logit_bias, logit_scale * image, text.t())
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(image)


def ours_siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    from sslkernels.losses import siglip_loss

    return siglip_loss(image, text, logit_scale, logit_bias)


# --- SupCon ------------------------------------------------------------------------------------------------------


def metric_learning_supcon(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    match = (labels[:, None] == labels[None, :]).byte()
    differ = match ^ 1
    match.fill_diagonal_(0)
    anchor, positive = torch.where(match)  # every pair as two int64 indices
    other, negative = torch.where(differ)
    s = torch.matmul(F.normalize(features, dim=1), F.normalize(features, dim=1).t())
    positive_mask, negative_mask = torch.zeros_like(s), torch.zeros_like(s)
    positive_mask[anchor, positive] = 1
    negative_mask[other, negative] = 1
    if not (positive_mask.bool().any() and negative_mask.bool().any()):
        return (features * 0).sum()
    s = s / temperature
    s = s - s.max(dim=1, keepdim=True)[0].detach()
    keep = (positive_mask + negative_mask).bool()
    denominator = s.masked_fill(~keep, torch.finfo(s.dtype).min).logsumexp(1, keepdim=True)
    denominator = denominator.masked_fill(~keep.any(1, keepdim=True), 0)
    log_prob = s - denominator
    count = positive_mask.sum(1) + torch.finfo(s.dtype).tiny
    losses = -(positive_mask * log_prob).sum(1) / count
    return losses[losses > 0].mean()


def original_supcon(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The authors' form with one view, normalised first as their network does, base temperature = temperature."""
    z = F.normalize(features, dim=1)
    labels = labels.view(-1, 1)
    mask = torch.eq(labels, labels.T).float()
    s = torch.div(torch.matmul(z, z.T), temperature)
    s = s - s.max(dim=1, keepdim=True)[0].detach()
    mask = mask.repeat(1, 1)
    not_self = torch.scatter(torch.ones_like(mask), 1, torch.arange(len(z)).view(-1, 1), 0)
    mask = mask * not_self
    weights = torch.exp(s) * not_self
    log_prob = s - torch.log(weights.sum(1, keepdim=True) + 1e-9)
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def lean_supcon(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Positives through class sums: sum_{p in P(i)} s_ip = <z_i, C_y(i) - z_i> / temperature, no mask of pairs."""
    z = F.normalize(features, dim=1)
    logits = (z / temperature) @ z.t()
    logits.fill_diagonal_(-torch.inf)
    count = torch.bincount(labels)[labels] - 1
    sums = torch.zeros(int(labels.max()) + 1, z.shape[1], dtype=z.dtype).index_add(0, labels, z)
    positive = (z * (sums[labels] - z)).sum(1) / (temperature * count.clamp(min=1))
    return (logits.logsumexp(1) - positive)[count > 0].mean()


def ours_supcon(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    from sslkernels.losses import supcon

    return supcon(features, labels, temperature=temperature)


LEAN = "our algebra in plain torch"
OURS = "this library"

NT_XENT = (
    Contender("sslkernels", ours_nt_xent, OURS),
    Contender("lightly", lightly_nt_xent, "lightly, loss/ntx_ent_loss.py, NTXentLoss"),
    Contender("solo-learn", solo_nt_xent, "solo-learn, losses/simclr.py (no maximum is subtracted)"),
    Contender("lean", lean_nt_xent, LEAN),
)
INFO_NCE = (
    Contender("sslkernels", ours_info_nce, OURS),
    Contender("info-nce", info_nce_in_batch, "info-nce-pytorch, InfoNCE with negative_keys=None"),
    Contender("lean", lean_info_nce, LEAN),
)
MOCO = (
    Contender("sslkernels", ours_moco, OURS),
    Contender("moco", moco_builder, "facebookresearch/moco, builder.py and main_moco.py", prepare=columns),
    Contender("info-nce", info_nce_queue, "info-nce-pytorch, InfoNCE with unpaired negative_keys"),
    Contender("lean", lean_moco, LEAN),
)
CLIP = (
    Contender("sslkernels", ours_clip, OURS),
    Contender("open_clip", open_clip_clip, "open_clip, loss.py, ClipLoss"),
    Contender("lean", lean_clip, LEAN),
)
SIGLIP = (
    Contender("sslkernels", ours_siglip, OURS),
    Contender("open_clip", open_clip_siglip, "open_clip, loss.py, SigLipLoss"),
    Contender(
        "open_clip-chunked",
        open_clip_siglip_chunked,
        "open_clip main branch (after 3.3), loss.py, SigLipLoss(chunk_size=1024)",
    ),
    Contender("lean", lean_siglip, LEAN),
)
SUPCON = (
    Contender("sslkernels", ours_supcon, OURS),
    Contender("pytorch-metric-learning", metric_learning_supcon, "pytorch-metric-learning, SupConLoss"),
    Contender("SupContrast", original_supcon, "HobbitLong/SupContrast, losses.py"),
    Contender("lean", lean_supcon, LEAN),
)
