# SPDX-License-Identifier: Apache-2.0
"""What `python -m benchmarks.occupancy` compiles: calls of the Triton launchers at the shapes that training has.

A module has the name of its family. `CASES` maps a name to a function of a dtype, which calls launchers on meta
tensors; `TENSOR_CORES` names the kernels that must multiply 16-bit operands on tensor cores, `SPILLS` those that may
spill registers, with the most bytes that are allowed on any architecture and the reason beside it.
"""
