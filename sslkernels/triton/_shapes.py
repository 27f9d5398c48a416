# SPDX-License-Identifier: Apache-2.0
"""The one table of launch shapes: architecture -> kind of kernel -> bytes of an element -> tile, warps and stages.

Shared memory: sm_80 keeps to 99 KiB, so that 8.6, 8.9 and 12.0 take its row; sm_90 and sm_100 to 227 KiB, gfx942 to 64.
The interpreter's tiles are the smallest there are: small inputs cross their borders. `python -m benchmarks.occupancy`
shows what each needs; `make gpu` times them.
"""

from __future__ import annotations

from typing import Any

_DISTRACTORS = {"BLOCK_C": 32, "BLOCK_L": 128, "num_warps": 4}
_ROW = {"BLOCK": 1024, "num_warps": 4}  # a program a row, in pieces
_COMPLETE = {"BLOCK": 16, "BLOCK_D": 32, "num_warps": 4}
_LARGEST = {"BLOCK": 4096, "num_warps": 8}  # one program
_SAMPLED = {"ELEMENTS": 4096, "num_warps": 4}  # of the tile of gathered keys
_TWO_VIEW = {
    2: {"BLOCK_N": 16, "BLOCK_M": 64, "DEPTH": 256, "num_warps": 4, "num_stages": 2},
    4: {"BLOCK_N": 16, "BLOCK_M": 32, "DEPTH": 256, "num_warps": 8, "num_stages": 2},
}
_EIGHTHS = {"HALVINGS": 3}  # of a tile, before arithmetic that takes several registers an element
_MERGE = {"BLOCK": 64, "SLOTS": 32, "BLOCK_D": 32, "num_warps": 4}


def _tile(n: int, m: int, d: int, warps: int, stages: int) -> dict[str, int]:
    """Of scores: n rows, m columns, d features at a time; GROUP rows of tiles share their operands in L2."""
    return {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d, "GROUP": 16, "num_warps": warps, "num_stages": stages}


# as on a GPU more rows than columns, and more groups of tiles than one
_TINY = _tile(32, 16, 16, 4, 1) | {"GROUP": 2}
_TWO = {"maxnreg": 128}  # registers a thread, so that two blocks of 8 warps share a multiprocessor

# the correlation's: columns of both views, elements of an (N, D) matrix, pieces of a tile of K, sums of partial sums
_COLUMNS = {"BLOCK_R": 128, "BLOCK_C": 32, "num_warps": 8}
_ELEMENTS = {"BLOCK_R": 32, "BLOCK_C": 128, "num_warps": 4}
_CLOSE = {"BLOCK_R": 16, "num_warps": 4}
_TOTAL = {"BLOCK": 1024, "num_warps": 4}
_REGRESSION = {
    "regression_rows": {"ELEMENTS": 4096, "num_warps": 4},  # warps grow with a row
    "regression_count": {"SPAN": 32768, "num_warps": 8},
    "regression_mean": {"BLOCK": 1024, "num_warps": 4},
    "regression_layers": {"BLOCK_R": 32, "BLOCK_C": 64, "num_warps": 4},
}


def _product(m: int, n: int, k: int, stages: int, warps: int = 8) -> dict[str, int]:
    """Of two matrices: m rows, n columns, k multiplied at a time."""
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def _correlation(gradient: dict, whole: dict, stages: int, features: dict | None = None) -> dict[str, Any]:
    """16-bit products of K, of the gradient, of one whose tile has all rows, and of C; float32 ones without tf32."""
    wide = _product(64, 64, 16, 3, 4)
    return {
        "correlation_columns": _COLUMNS,
        "correlation_elements": _ELEMENTS,
        "correlation_close": _CLOSE,
        "correlation_total": _TOTAL,
        "correlation_gram": {
            2: {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages},
            4: {"BLOCK_M": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
        },
        "correlation_gradient": {2: gradient, 4: wide},
        "correlation_gradient_whole": {2: whole, 4: wide},
        "correlation_features": {2: features or gradient, 4: wide},
    }


# distillation: rows of tens of thousands of logits
_LOGITS: dict[str, Any] = {
    "row_peak": {"BLOCK": 2048, "num_warps": 8},
    "meet": {"BLOCK": 2048, "num_warps": 8},  # prototypes of one sample
    "column_sums": {"BLOCK_R": 16, "BLOCK_C": 128, "num_warps": 4},
    "sinkhorn": {"TILE": 8192, "BLOCK_C": 256, "num_warps": 8},  # elements; columns where rows are not whole
    "sinkhorn_merge": {"BLOCK_P": 256, "BLOCK_C": 16, "num_warps": 4},
}
# ptxas takes registers for which it has little use: with a bound more programs run at once
_MEET_NVIDIA = _LOGITS["meet"] | {"maxnreg": 80}


def _prototypes(stages: int, **bound: int) -> dict[str, Any]:
    """Rows and prototypes of a tile of logits (`bound`: its registers), and the same for all teachers of samples."""
    return {
        "prototypes": {2: _keys(128, 64, 64, 8, stages) | bound, 4: _keys(64, 64, 32, 8, stages)},
        "teachers": {2: _keys(64, 64, 64, 4, stages), 4: _keys(64, 64, 32, 8, stages)},
    }


_TOKENS = {  # passes over rows and panels
    "tokens_select": {"BLOCK": 2048, "num_warps": 8},
    "tokens_join": {"BLOCK_R": 8, "BLOCK_S": 64, "BLOCK_D": 128, "num_warps": 4},
    "tokens_slopes": {"BLOCK_R": 32, "num_warps": 4},
    "tokens_gather": {"BLOCK_R": 8, "BLOCK_D": 256, "num_warps": 4},
    "tokens_bias": {"BLOCK_R": 16, "BLOCK_V": 128, "num_warps": 4},
    "tokens_total": {"BLOCK": 4096, "num_warps": 8},
    "skipgram": {"BLOCK_B": 16, "BLOCK_D": 64, "num_warps": 4},
    "skipgram_sums": {"BLOCK_B": 16, "BLOCK_D": 128, "num_warps": 4},
}
_NEIGHBORS = {
    "centre": {"BLOCK_D": 32, "num_warps": 4},
    "neighbor_rows": {"BLOCK_R": 8, "BLOCK_D": 256, "num_warps": 4},
}


def _keys(n: int, m: int, d: int, warps: int, stages: int) -> dict[str, int]:
    """Of rows and keys, or classes: n rows, m keys, d features at a time."""
    return {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}


# what every GPU takes the same of
_EVERYWHERE: dict[str, Any] = {
    "complete": _COMPLETE,
    "distractors": _DISTRACTORS,
    "largest": _LARGEST,
    "merge": _MERGE,
    "row": _ROW,
    "sampled": _SAMPLED,
    "two_view": _TWO_VIEW,
    **_REGRESSION,
    **_LOGITS,
    **_TOKENS,
    **_NEIGHBORS,
}

SHAPES: dict[str, dict[str, Any]] = {
    "sm_80": {
        **_EVERYWHERE,
        "scores": {2: _tile(128, 128, 32, 8, 3), 4: _tile(64, 64, 32, 4, 2)},
        "scores_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 64, 64, 8, 2)},
        "attention_whole": {2: _tile(64, 64, 128, 4, 2), 4: _tile(64, 32, 64, 8, 2)},
        "gradient_whole": {2: _tile(64, 64, 128, 4, 2), 4: _tile(64, 32, 64, 8, 2)},
        "softplus": {2: _tile(128, 128, 32, 8, 4) | _EIGHTHS, 4: _tile(64, 64, 32, 4, 3) | _EIGHTHS},
        **_correlation(_product(128, 128, 32, 4), _product(256, 64, 32, 3), 3),
        "meet": _MEET_NVIDIA,
        **_prototypes(3, maxnreg=128),
        "nearest": {2: _keys(128, 128, 32, 8, 3), 4: _keys(64, 64, 16, 4, 2)},
        "topk": {2: _keys(64, 128, 32, 8, 3), 4: _keys(64, 64, 16, 8, 2)},
        "tokens_logits": {2: _keys(128, 128, 32, 8, 3), 4: _keys(64, 64, 16, 4, 2)},
        "tokens_product": {2: _product(128, 128, 32, 4), 4: _product(64, 64, 16, 2, 4)},
        "panel": {2: _tile(128, 128, 32, 8, 3), 4: _tile(64, 64, 32, 4, 2)},
    },
    "sm_90": {
        **_EVERYWHERE,
        "scores": {2: _tile(128, 128, 64, 8, 3) | _TWO, 4: _tile(64, 64, 32, 8, 2)},
        "scores_whole": {2: _tile(128, 64, 128, 8, 2) | _TWO, 4: _tile(64, 64, 64, 8, 2)},
        "attention_whole": {2: _tile(64, 64, 128, 4, 3), 4: _tile(64, 32, 64, 8, 2)},
        "gradient_whole": {2: _tile(64, 64, 128, 4, 3), 4: _tile(64, 32, 64, 8, 2)},
        "softplus": {2: _tile(128, 128, 64, 8, 3) | _EIGHTHS | _TWO, 4: _tile(64, 64, 32, 4, 3) | _EIGHTHS},
        **_correlation(_product(128, 128, 64, 3), _product(256, 64, 64, 3), 3, _product(128, 256, 64, 3)),
        "meet": _MEET_NVIDIA,
        **_prototypes(3, maxnreg=128),
        "nearest": {2: _keys(128, 128, 64, 8, 4), 4: _keys(64, 64, 16, 4, 2)},
        "topk": {2: _keys(64, 128, 64, 8, 3), 4: _keys(64, 64, 16, 8, 2)},
        "tokens_logits": {2: _keys(128, 256, 64, 8, 3), 4: _keys(64, 64, 16, 4, 2)},
        "tokens_product": {2: _product(128, 256, 64, 3), 4: _product(64, 64, 16, 3, 4)},
        "panel": {2: _tile(128, 128, 64, 4, 3), 4: _tile(64, 64, 32, 4, 2)},
    },
    "sm_100": {
        **_EVERYWHERE,
        "scores": {2: _tile(128, 128, 64, 8, 3), 4: _tile(64, 64, 32, 4, 2)},
        "scores_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 64, 64, 8, 2)},
        "attention_whole": {2: _tile(64, 64, 128, 4, 3), 4: _tile(64, 32, 64, 8, 2)},
        "gradient_whole": {2: _tile(64, 64, 128, 4, 3), 4: _tile(64, 32, 64, 8, 2)},
        "softplus": {2: _tile(128, 128, 64, 8, 3) | _EIGHTHS, 4: _tile(64, 64, 32, 4, 3) | _EIGHTHS},
        **_correlation(_product(128, 128, 64, 3), _product(256, 64, 64, 3), 3, _product(128, 256, 64, 3)),
        "meet": _MEET_NVIDIA,
        **_prototypes(3),
        "nearest": {2: _keys(128, 128, 64, 8, 4), 4: _keys(64, 64, 16, 4, 2)},
        "topk": {2: _keys(64, 128, 64, 8, 3), 4: _keys(64, 64, 16, 8, 2)},
        "tokens_logits": {2: _keys(128, 256, 64, 8, 3), 4: _keys(64, 64, 16, 4, 2)},
        "tokens_product": {2: _product(128, 256, 64, 3), 4: _product(64, 64, 16, 3, 4)},
        "panel": {2: _tile(128, 128, 64, 8, 3), 4: _tile(64, 64, 32, 4, 2)},
    },
    "gfx942": {
        **_EVERYWHERE,
        "scores": {2: _tile(128, 128, 32, 8, 2), 4: _tile(64, 64, 32, 4, 2)},
        "scores_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 64, 64, 8, 2)},
        "attention_whole": {2: _tile(64, 64, 128, 4, 2), 4: _tile(64, 32, 64, 8, 2)},
        "gradient_whole": {2: _tile(64, 64, 128, 4, 2), 4: _tile(64, 32, 64, 8, 2)},
        "softplus": {2: _tile(128, 128, 64, 8, 2) | _EIGHTHS, 4: _tile(64, 64, 32, 4, 2) | _EIGHTHS},
        "two_view": _TWO_VIEW | {4: _TWO_VIEW[4] | {"DEPTH": 128}},
        **_correlation(_product(128, 128, 64, 2), _product(256, 64, 32, 2), 2),
        **_prototypes(2),
        "nearest": {2: _keys(128, 128, 32, 8, 2), 4: _keys(64, 64, 16, 4, 2)},
        "topk": {2: _keys(64, 128, 32, 8, 2), 4: _keys(64, 64, 16, 8, 2)},
        "tokens_logits": {2: _keys(128, 128, 32, 8, 2), 4: _keys(64, 64, 16, 4, 2)},
        "tokens_product": {2: _product(128, 128, 32, 2), 4: _product(64, 64, 16, 2, 4)},
        "panel": {2: _tile(128, 128, 32, 8, 2), 4: _tile(64, 64, 32, 4, 2)},
    },
    "interpreter": {
        "distractors": {"BLOCK_C": 8, "BLOCK_L": 8},
        "row": {"BLOCK": 16},
        "scores": _TINY,
        "scores_whole": _TINY | {"BLOCK_D": 32},
        "attention_whole": _TINY | {"BLOCK_D": 32},
        "complete": {"BLOCK": 16, "BLOCK_D": 16},
        "gradient_whole": _TINY | {"BLOCK_D": 32},
        "largest": {"BLOCK": 16},
        "merge": {"BLOCK": 16, "SLOTS": 4, "BLOCK_D": 16},
        "sampled": {"ELEMENTS": 128},
        "softplus": _TINY | {"HALVINGS": 2},
        "two_view": {"BLOCK_N": 16, "BLOCK_M": 16, "DEPTH": 32},
        "regression_rows": {"ELEMENTS": 32},
        "regression_count": {"SPAN": 8},
        "regression_mean": {"BLOCK": 8},
        "regression_layers": {"BLOCK_R": 4, "BLOCK_C": 8},
        "correlation_columns": {"BLOCK_R": 16, "BLOCK_C": 32},
        "correlation_elements": {"BLOCK_R": 16, "BLOCK_C": 64},
        "correlation_close": {"BLOCK_R": 16},
        "correlation_total": {"BLOCK": 16},
        "correlation_gram": {"BLOCK_M": 16, "BLOCK_K": 32},
        "correlation_gradient": {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16},
        "correlation_gradient_whole": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16},
        "correlation_features": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32},
        "row_peak": {"BLOCK": 16},
        "meet": {"BLOCK": 16},
        "column_sums": {"BLOCK_R": 4, "BLOCK_C": 16},
        "prototypes": {"BLOCK_N": 16, "BLOCK_M": 16, "BLOCK_D": 16},
        "teachers": {"BLOCK_N": 16, "BLOCK_M": 16, "BLOCK_D": 16},
        "sinkhorn": {"TILE": 64, "BLOCK_C": 16, "num_warps": 1},
        "sinkhorn_merge": {"BLOCK_P": 4, "BLOCK_C": 16},
        "centre": {"BLOCK_D": 32},
        "neighbor_rows": {"BLOCK_R": 16, "BLOCK_D": 16},
        "nearest": {"BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_D": 16},
        "topk": {"BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_D": 16},
        "tokens_select": {"BLOCK": 16},
        "tokens_logits": {"BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_D": 16},
        "tokens_join": {"BLOCK_R": 16, "BLOCK_S": 2, "BLOCK_D": 16},
        "tokens_slopes": {"BLOCK_R": 32},
        "tokens_gather": {"BLOCK_R": 16, "BLOCK_D": 16},
        "tokens_product": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
        "tokens_bias": {"BLOCK_R": 16, "BLOCK_V": 64},
        "tokens_total": {"BLOCK": 16},
        "skipgram": {"BLOCK_B": 16, "BLOCK_D": 16},
        "skipgram_sums": {"BLOCK_B": 4, "BLOCK_D": 16},
        "panel": _TINY,
    },
}
