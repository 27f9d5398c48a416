# SPDX-License-Identifier: Apache-2.0
"""The library on a GPU: `python -m benchmarks.gpu` builds, tests, times, and writes what it found."""
