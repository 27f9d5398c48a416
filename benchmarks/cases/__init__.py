# SPDX-License-Identifier: Apache-2.0
"""The declared cases, by family."""

from benchmarks.case import Case
from benchmarks.cases import contrastive, correlation, distillation, ema, masks, neighbors, patches, regression, tokens

FAMILIES: dict[str, tuple[Case, ...]] = {
    "contrastive": contrastive.CASES,
    "correlation": correlation.CASES,
    "distillation": distillation.CASES,
    "patches": patches.CASES,
    "masks": masks.CASES,
    "regression": regression.CASES,
    "ema": ema.CASES,
    "tokens": tokens.CASES,
    "neighbors": neighbors.CASES,
}

# The README shows these; docs/benchmarks.md shows all.
README = (
    "nt_xent-256-128",
    "nt_xent-2048-128",
    "nt_xent-4096-128",
    "clip-4096-128",
    "siglip-4096-512",
    "moco-256-65536-128",
    "supcon-4096-128-100",
    "barlow_twins-256-8192",
    "barlow_twins-2048-4096",
    "vicreg-256-8192",
    "dino-64",
    "linear_dino",
    "ibot_patches",
    "sinkhorn_knopp",
    "swav",
    "embed_patches",
    "masked_patch_loss",
    "restore_tokens",
    "block_mask-16",
    "multiblock_mask",
    "span_mask",
    "masked_regression",
    "linear_cross_entropy-masked",
    "linear_cross_entropy-causal",
    "hubert",
    "wav2vec2",
    "skipgram_update",
    "topk_similarity-dot",
    "nearest",
    "koleo-4096-1024",
    "uniformity",
    "ema_update-float32",
    "ema_update-bfloat16",
)


def find(name: str) -> Case:
    for cases in FAMILIES.values():
        for case in cases:
            if case.name == name:
                return case
    raise ValueError(f"no case {name!r}; `python -m benchmarks --list` names them")
