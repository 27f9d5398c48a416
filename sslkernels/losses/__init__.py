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

__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "InfoNCELoss",
    "MemoryQueue",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "clamp_logit_scale_",
    "clip_loss",
    "dcl",
    "info_nce",
    "mises_fisher_weights",
    "nt_xent",
    "siglip_loss",
    "supcon",
]
