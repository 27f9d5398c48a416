# SPDX-License-Identifier: Apache-2.0
"""The definition of each primitive in plain differentiable PyTorch; one module a family."""
