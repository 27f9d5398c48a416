# SPDX-License-Identifier: Apache-2.0
"""Tokens in plain differentiable PyTorch: the definition, on any device, in any floating dtype.

Arithmetic is float64 for float64 input and float32 otherwise.
"""

from sslkernels.reference._linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
