# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch

from benchmarks import memory

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def test_status_fields_are_bytes():
    text = "VmPeak:\t  999 kB\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert memory.status_bytes("VmHWM", text) == 2 * 2**20
    assert memory.status_bytes("VmRSS", text) == 2**20
    with pytest.raises(ValueError, match="expected a line VmSwap"):
        memory.status_bytes("VmSwap", text)


def test_inputs_and_leaf_gradients_are_subtracted():
    assert memory.above(peak=100 * 2**20, before=60 * 2**20, gradients=4 * 2**20) == 36.0
    assert memory.above(peak=100, before=100, gradients=50) == 0.0


def test_tensor_bytes():
    assert memory.tensor_bytes([torch.zeros(3, 4), torch.zeros(5, dtype=torch.float64)]) == 48 + 40
    assert memory.tensor_bytes([]) == 0


@linux
def test_a_passing_allocation_is_seen_and_a_returned_gradient_is_not():
    def step():
        torch.ones(16 * 2**20).sum()  # 64 MiB, gone before the step ends
        return [torch.ones(4 * 2**20)]  # 16 MiB: a leaf gradient

    memory.peak_mib(step)
    assert memory.peak_mib(step) == pytest.approx(48, abs=2)
