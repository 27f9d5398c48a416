# SPDX-License-Identifier: Apache-2.0
"""What plans launches on a GPU: every element belongs to one block of one launch, beyond 2^31 too. Needs no GPU."""

from __future__ import annotations

from itertools import accumulate
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CHUNK, MAX_GRID = 4096, 2**31 - 1
COUNTS = st.sampled_from([0, 1, 255, 256, 257, 2**31 - 1, 2**31, 2**31 + 1, 256 * MAX_GRID, 256 * MAX_GRID + 1, 2**62])
plans = settings(deadline=None)


@plans
@given(count=COUNTS, threads=st.sampled_from([1, 32, 256, 1024]))
def test_blocks_of(module: ModuleType, count: int, threads: int) -> None:
    assert module.blocks_of(count, threads, MAX_GRID) == min(-(-count // threads), MAX_GRID)


@plans
@given(
    rows=st.sampled_from([0, 1, 127, 128, 129, 2047, 65536, 2**31 + 1, 2**40]),
    cols=st.sampled_from([0, 1, 32, 33, 8192, 2**31 + 1]),
    strip=st.sampled_from([32, 64]),
    multiprocessors=st.sampled_from([1, 2, 108, 132]),
)
def test_parts_cover_the_matrix(module: ModuleType, rows: int, cols: int, strip: int, multiprocessors: int) -> None:
    strips, count, each = module.plan_parts(rows, cols, strip, multiprocessors)
    assert strips == -(-cols // strip)
    assert 1 <= count <= min(2 * multiprocessors, 65535)
    assert (count - 1) * each < max(rows, 1) and rows <= count * each
    assert count == 1 or (each >= 128 and 4 * strips < 3 * multiprocessors)


@plans
@given(
    numels=st.lists(
        st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10**6, 2**31, 2**40, CHUNK * MAX_GRID]), max_size=9
    ),
    capacity=st.integers(1, 4),
)
def test_launches_cover_the_list_in_order(module: ModuleType, numels: list[int], capacity: int) -> None:
    launches = module.plan_launches(numels, capacity)
    assert [i for begin, end, _ in launches for i in range(begin, end)] == list(range(len(numels)))
    for begin, end, blocks in launches:
        assert blocks == sum(-(-n // CHUNK) for n in numels[begin:end]) <= MAX_GRID
        assert 0 < end - begin <= capacity


def test_usual_list_takes_one_launch(module: ModuleType) -> None:
    assert len(module.plan_launches([768 * 768] * 152, 1024)) == 1


def test_more_than_a_launch_can_hold_is_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="more thread blocks than one launch has"):
        module.plan_launches([CHUNK * MAX_GRID + 1], 8)


@plans
@given(blocks=st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_each_block_finds_its_tensor(module: ModuleType, blocks: list[int]) -> None:
    starts = [0, *accumulate(blocks[:-1])]
    owners = [i for i, n in enumerate(blocks) for _ in range(n)]
    assert [module.find_tensor(starts, block) for block in range(sum(blocks))] == owners


@pytest.mark.parametrize(
    ("sizes", "strides", "dense"),
    [
        ((), (), True),
        ((3,), (1,), True),
        ((3,), (2,), False),
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), True),
        ((2, 2), (3, 0), False),  # spans four elements, of which only two are its own
        ((4, 1), (1, 99), True),
        ((0, 3), (7, 7), True),
        ((2, 3, 4, 5), (60, 1, 15, 3), True),  # channels_last
    ],
)
def test_dense(module: ModuleType, sizes: tuple[int, ...], strides: tuple[int, ...], dense: bool) -> None:
    assert module.is_dense(sizes, strides) is dense
