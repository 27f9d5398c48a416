# SPDX-License-Identifier: Apache-2.0
"""csrc/common/chunks.h: every element of a tensor list belongs to one block of one launch. Needs no GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
CHUNK, MAX_BLOCKS = 4096, 2**31 - 1
MAIN = r"""
#include <cstdio>
#include <iostream>
#include "common/chunks.h"
// Reads lines "plan CAPACITY NUMEL...", "find BLOCK FIRST...", "dense RANK SIZE... STRIDE..."; answers one line each.
#include <sstream>
#include <string>
int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string verb;
    int64_t first, value;
    words >> verb >> first;
    std::vector<int64_t> rest;
    while (words >> value) rest.push_back(value);
    if (verb == "plan") {
      try {
        const char* comma = "";
        const auto launches = sslkernels::plan_launches(rest, first);
        std::printf("[");
        for (const auto& part : launches) {
          std::printf("%s[%zu,%zu,%lld]", comma, part.begin, part.end, static_cast<long long>(part.blocks));
          comma = ",";
        }
        std::printf("]\n");
      } catch (const std::length_error&) {
        std::printf("null\n");
      }
    } else if (verb == "find") {
      const std::vector<uint32_t> starts(rest.begin(), rest.end());
      std::printf("%d\n", sslkernels::find_tensor(starts.data(), starts.size(), first));
    } else {
      const auto middle = rest.begin() + first;
      std::printf("%s\n", sslkernels::is_dense({rest.begin(), middle}, {middle, rest.end()}) ? "true" : "false");
    }
    std::fflush(stdout);
  }
}
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder: Path = tmp_path_factory.mktemp("chunks")
    (folder / "main.cpp").write_text(MAIN)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(folder / "main.cpp"), "-o", str(folder / "main")], check=True)
    process = subprocess.Popen([folder / "main"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def question(verb: str, *numbers: int):
        process.stdin.write(" ".join(map(str, (verb, *numbers))) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield question
    process.stdin.close()
    process.wait()


@settings(deadline=None)
@given(
    numels=st.lists(
        st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10**6, 2**31, 2**40, CHUNK * MAX_BLOCKS]), max_size=9
    ),
    capacity=st.integers(1, 4),
)
def test_launches_cover_the_list_in_order(ask, numels: list[int], capacity: int) -> None:
    launches = ask("plan", capacity, *numels)
    assert [i for begin, end, _ in launches for i in range(begin, end)] == list(range(len(numels)))
    for begin, end, blocks in launches:
        assert blocks == sum(-(-n // CHUNK) for n in numels[begin:end]) <= MAX_BLOCKS
        assert 0 < end - begin <= capacity


def test_usual_list_takes_one_launch(ask) -> None:
    assert len(ask("plan", 1024, *[768 * 768] * 152)) == 1


def test_more_than_a_launch_can_hold_is_refused(ask) -> None:
    assert ask("plan", 8, CHUNK * MAX_BLOCKS + 1) is None


@settings(deadline=None)
@given(blocks=st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_each_block_finds_its_tensor(ask, blocks: list[int]) -> None:
    starts = [0, *accumulate(blocks[:-1])]
    owners = [i for i, n in enumerate(blocks) for _ in range(n)]
    assert [ask("find", block, *starts) for block in range(sum(blocks))] == owners


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
def test_dense(ask, sizes: tuple[int, ...], strides: tuple[int, ...], dense: bool) -> None:
    assert ask("dense", len(sizes), *sizes, *strides) is dense
