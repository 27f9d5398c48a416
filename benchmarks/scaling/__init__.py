# SPDX-License-Identifier: Apache-2.0
"""What it costs when a loss spans ranks: bytes counted and by formula, time and memory measured and predicted."""
