# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m benchmarks --help`; docs/benchmarks.md says how everything is measured."""
