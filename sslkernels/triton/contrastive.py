# SPDX-License-Identifier: Apache-2.0
"""The contrastive ops on a GPU; signatures are the schemas'."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from sslkernels.triton._attention import similarity_row_attention
from sslkernels.triton._cross_entropy import similarity_cross_entropy
from sslkernels.triton._distractors import distractor_counts
from sslkernels.triton._gradients import self_similarity_logsumexp_backward, similarity_logsumexp_backward
from sslkernels.triton._lse import self_similarity_logsumexp, similarity_logsumexp
from sslkernels.triton._rows import l2_normalize, l2_normalize_backward
from sslkernels.triton._sampled import sampled_logsumexp, sampled_logsumexp_backward
from sslkernels.triton._softplus import similarity_softplus, similarity_softplus_backward, similarity_softplus_sum
from sslkernels.triton._two_view import two_view_cross_entropy

__all__ = [
    "distractor_counts",
    "l2_normalize",
    "l2_normalize_backward",
    "sampled_logsumexp",
    "sampled_logsumexp_backward",
    "self_similarity_logsumexp",
    "self_similarity_logsumexp_backward",
    "similarity_cross_entropy",
    "similarity_logsumexp",
    "similarity_logsumexp_backward",
    "similarity_row_attention",
    "similarity_softplus",
    "similarity_softplus_backward",
    "similarity_softplus_sum",
    "two_view_cross_entropy",
]
