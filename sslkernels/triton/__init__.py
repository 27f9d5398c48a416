# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one module a family; a function has the name and the arguments of the op that it serves.

Nothing here is imported before an op's first call on a GPU, so `import sslkernels` needs no Triton.
"""

# op -> the module that has its launcher
KERNELS = {
    "average_layers": "regression",
    "distractor_counts": "contrastive",
    "l2_normalize": "contrastive",
    "l2_normalize_backward": "contrastive",
    "linear_cross_entropy": "tokens",
    "linear_cross_entropy_rows": "tokens",
    "linear_cross_entropy_rows_backward": "tokens",
    "linear_soft_cross_entropy": "distillation",
    "masked_regression": "regression",
    "masked_regression_rows": "regression",
    "masked_regression_rows_backward": "regression",
    "nearest": "neighbors",
    "product_frobenius": "correlation",
    "sampled_logsumexp": "contrastive",
    "sampled_logsumexp_backward": "contrastive",
    "self_similarity_logsumexp": "contrastive",
    "self_similarity_logsumexp_backward": "contrastive",
    "similarity_cross_entropy": "contrastive",
    "similarity_logsumexp": "contrastive",
    "similarity_logsumexp_backward": "contrastive",
    "similarity_row_attention": "contrastive",
    "similarity_softplus": "contrastive",
    "similarity_softplus_backward": "contrastive",
    "similarity_softplus_sum": "contrastive",
    "sinkhorn_center": "distillation",
    "sinkhorn_knopp": "distillation",
    "sinkhorn_sweep": "distillation",
    "skipgram": "tokens",
    "skipgram_backward": "tokens",
    "skipgram_backward_rows": "tokens",
    "soft_cross_entropy": "distillation",
    "soft_cross_entropy_": "distillation",
    "soft_cross_entropy_rows": "distillation",
    "soft_cross_entropy_rows_backward": "distillation",
    "softmax_center": "distillation",
    "topk_similarity": "neighbors",
    "two_view_correlation": "correlation",
    "two_view_covariance": "correlation",
    "two_view_cross_entropy": "contrastive",
}
