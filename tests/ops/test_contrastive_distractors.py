# SPDX-License-Identifier: Apache-2.0
"""The distractors of wav2vec 2.0: kernel against reference bit for bit, what is drawn, and how often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels.ops import distractor_counts
from sslkernels.reference import _distractors as reference

OP = torch.ops.sslkernels.distractor_counts.default
SEEDS = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    length=st.sampled_from([0, 1, 2, 3, 17, 64]),
    count=st.sampled_from([1, 2, 3, 4, 7, 100]),
    data=st.data(),
)
def test_kernel_is_reference(seed: int, length: int, count: int, data: Any) -> None:
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, length), max_size=4)), dtype=torch.int64)
    args = torch.tensor(seed), lengths, length, count
    assert torch.equal(OP(*args), reference.distractor_counts(*args))


def test_threads_do_not_matter(threads: int) -> None:
    args = torch.tensor(3), torch.full((8,), 200), 200, 100
    assert torch.equal(OP(*args), reference.distractor_counts(*args))


def test_a_frame_draws_others_of_its_sample_and_never_itself() -> None:
    lengths = torch.tensor([9, 1, 0, 2])
    counts = distractor_counts(lengths, 9, 25)
    assert counts.shape == (4, 9, 9) and counts.dtype == torch.float32
    assert (counts.diagonal(dim1=1, dim2=2) == 0).all()
    for sample, n in zip(counts, lengths.tolist()):
        assert (sample[:n].sum(1) == (25 if n > 1 else 0)).all()
        assert (sample[n:] == 0).all() and (sample[:, n:] == 0).all()


def test_draws_are_uniform_over_the_other_frames() -> None:
    """Chi-square of 20 x 19 cells; independent seeds, so that its mean and deviation are those of the distribution."""
    n, count, seeds = 20, 190, 200
    lengths = torch.tensor([n])
    statistics = []
    for seed in range(seeds):
        counts = distractor_counts(lengths, n, count, seed=seed)[0].double()
        others = counts[~torch.eye(n, dtype=torch.bool)]
        expected = count / (n - 1)
        statistics.append(((others - expected) ** 2 / expected).sum())
    degrees = n * (n - 2)  # each row of 19 cells has one sum
    mean = torch.stack(statistics).mean()
    assert abs(mean - degrees) < 4 * (2 * degrees / seeds) ** 0.5


def test_draws_of_two_frames_and_two_samples_are_independent() -> None:
    counts = distractor_counts(torch.tensor([400, 400]), 400, 1, seed=1)
    first, second = (sample.argmax(1) for sample in counts)
    assert (first == second).sum() < 12  # by chance about one
    assert (first[1:] - first[:-1]).unique().numel() > 100


def test_the_same_length_draws_the_same_in_a_wider_batch() -> None:
    """fairseq's batches are padded to their longest: what a sample draws must not depend on its neighbours."""
    lengths = torch.tensor([7, 5])
    narrow, wide = distractor_counts(lengths, 7, 10, seed=4), distractor_counts(lengths, 12, 10, seed=4)
    assert torch.equal(wide[:, :7, :7], narrow)


def test_seed_and_generator() -> None:
    lengths = torch.tensor([30])

    def draw(**options: Any) -> Tensor:
        return distractor_counts(lengths, 30, 10, **options)

    assert torch.equal(draw(seed=1), draw(seed=torch.tensor(1)))
    assert not torch.equal(draw(seed=1), draw(seed=2))
    assert torch.equal(*(draw(generator=torch.Generator().manual_seed(5)) for _ in range(2)))
    assert not torch.equal(draw(), draw())


def test_opcheck_and_compile() -> None:
    torch.library.opcheck(OP, (torch.tensor(3), torch.tensor([4, 2]), 5, 7))
    torch.compiler.reset()
    compiled = torch.compile(lambda n: distractor_counts(n, 5, 7, seed=3), backend="aot_eager", fullgraph=True)
    lengths = torch.tensor([4, 2])
    assert torch.equal(compiled(lengths), distractor_counts(lengths, 5, 7, seed=3))


def test_bad_input() -> None:
    lengths = torch.tensor([3, 2])
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 3\), got 3"):
        distractor_counts(lengths, 2)
    with pytest.raises(TypeError, match=r"lengths must be one of torch\.int64, got torch\.int32"):
        distractor_counts(lengths.int(), 3)
    with pytest.raises(ValueError, match=r"lengths must have shape \(2,\), got \(2, 1\)"):
        distractor_counts(lengths[:, None], 3)
    with pytest.raises(ValueError, match=r"num_distractors must be in .*, got 0"):
        distractor_counts(lengths, 3, 0)
    with pytest.raises(TypeError, match=r"length must be an integer, got float"):
        distractor_counts(lengths, 3.0)
    with pytest.raises(ValueError, match="expected one of seed and generator, got both"):
        distractor_counts(lengths, 3, seed=1, generator=torch.Generator())
