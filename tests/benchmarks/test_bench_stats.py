# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from benchmarks.stats import Summary, baseline, judge, seconds, speedup, summary


def test_quartiles_are_numpys():
    for count in (1, 2, 3, 4, 5, 15, 16):
        values = np.random.default_rng(count).exponential(size=count)
        got = summary(values.tolist())
        assert (got.low, got.median, got.high) == pytest.approx(tuple(np.percentile(values, [25, 50, 75])))


def test_quartiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        summary([])


def test_lower_quartile_of_15_lies_between_the_4th_and_the_5th():
    assert summary([float(i) for i in range(1, 16)]) == Summary(4.5, 8.0, 11.5)


def test_ratios_are_taken_round_by_round():
    # Both slow down threefold in the second round, as they do when a neighbour wakes up: the ratio does not move.
    times = {
        "sslkernels": {"forward": [1.0, 3.0], "backward": [1.0, 3.0]},
        "lightly": {"forward": [2.0, 6.0], "backward": [4.0, 12.0]},
    }
    assert speedup(times, "lightly") == Summary(3.0, 3.0, 3.0)
    assert speedup(times, "lightly", "forward") == Summary(2.0, 2.0, 2.0)
    assert seconds(times, "lightly") == [6.0, 18.0]


def test_unequal_numbers_of_rounds_are_refused():
    times = {"sslkernels": {"forward": [1.0], "backward": [1.0]}, "lean": {"forward": [1.0] * 2, "backward": [1.0] * 2}}
    with pytest.raises(ValueError):
        speedup(times, "lean")


def test_eager_is_the_fastest_of_the_shipped_forms(results):
    case = results["cases"]["nt_xent-2048-128"]
    times = case["time"]["kept"]
    assert baseline(case, times, "eager") == "solo-learn"  # lean is faster, but nobody ships it
    assert baseline(case, times, "lightly") == "lightly"
    del times["solo-learn"]
    assert baseline(case, times, "eager") == "lightly"
    assert baseline(case, times, "solo-learn") is None


def test_goals(results):
    case = results["cases"]["nt_xent-2048-128"]
    verdicts = [judge(case, goal, "kept") for goal in case["goals"]]
    assert [v.met for v in verdicts] == [True, False, True, True]
    assert verdicts[0].got == "6.00x (6.00-6.00)"
    assert verdicts[1].goal == "≥ 5x eager (solo-learn)" and verdicts[1].got.startswith("4.00x")
    assert verdicts[2].got == "0.80x (0.80-0.80)"
    assert verdicts[3].got == "2.2%"


def test_the_worse_quartile_decides(results):
    case = results["cases"]["nt_xent-2048-128"]
    at_least, _, at_most, _ = case["goals"]
    # Two of five rounds below the goal: the median reaches it, the lower quartile does not.
    case["time"]["kept"]["lightly"]["backward"] = [0.004, 0.005, 0.009, 0.009, 0.009]
    assert judge(case, at_least, "kept").met is False
    case["time"]["kept"]["gemm"]["backward"] = [0.0010, 0.0012, 0.0016, 0.0016, 0.0016]
    assert judge(case, at_most, "kept").met is False


def test_what_was_not_measured_is_not_met(results):
    case = results["cases"]["nt_xent-2048-128"]
    del case["time"]["kept"]["sslkernels"], case["memory"]["sslkernels"]
    assert [judge(case, goal, "kept").met for goal in case["goals"]] == [None] * 4
    assert judge(case, case["goals"][0], "no such regime").met is None
