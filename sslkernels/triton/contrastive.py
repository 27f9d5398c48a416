# SPDX-License-Identifier: Apache-2.0
"""The contrastive ops on a GPU; signatures are the schemas'."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from sslkernels.triton._attention import similarity_row_attention
from sslkernels.triton._gradients import self_similarity_logsumexp_backward, similarity_logsumexp_backward
from sslkernels.triton._lse import self_similarity_logsumexp, similarity_logsumexp
from sslkernels.triton._rows import l2_normalize, l2_normalize_backward

__all__ = [
    "l2_normalize",
    "l2_normalize_backward",
    "self_similarity_logsumexp",
    "self_similarity_logsumexp_backward",
    "similarity_logsumexp",
    "similarity_logsumexp_backward",
    "similarity_row_attention",
]
