# SPDX-License-Identifier: Apache-2.0
"""Every loss of the library, as a function and as a module."""

from sslkernels.losses.contrastive import (
    ClipLoss,
    DCLLoss,
    DCLWLoss,
    InfoNCELoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
    clamp_logit_scale_,
    clip_loss,
    dcl,
    info_nce,
    mises_fisher_weights,
    nt_xent,
    siglip_loss,
    supcon,
)
from sslkernels.losses.queue import MemoryQueue
from sslkernels.losses.regression import (
    BYOLLoss,
    MaskedRegressionLoss,
    NegativeCosineSimilarity,
    byol_loss,
    negative_cosine_similarity,
)

__all__ = [
    "BYOLLoss",
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "InfoNCELoss",
    "MaskedRegressionLoss",
    "MemoryQueue",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SigLipLoss",
    "SupConLoss",
    "byol_loss",
    "clamp_logit_scale_",
    "clip_loss",
    "dcl",
    "info_nce",
    "mises_fisher_weights",
    "negative_cosine_similarity",
    "nt_xent",
    "siglip_loss",
    "supcon",
]
