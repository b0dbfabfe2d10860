"""Tests and intervals: against values worked out by hand, against scipy, and by how often they hold in a simulation."""

import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from lethe.errors import InvalidValueError
from lethe.evaluation import significance
from lethe.evaluation.significance import Difference, Estimate, bootstrap, difference, holm, mcnemar, over_seeds
from lethe.types import Scores


def score(*values: float, better: str = "higher") -> Scores:
    """The mean of these values."""
    values = tuple(map(float, values))
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Scores(value=statistics.fmean(values), stderr=stderr, n=len(values), better=better, per_example=values)  # type: ignore[arg-type]


def one(*values: float) -> Estimate:
    return over_seeds([score(*values)])


def alone(value: float, stderr: float, n: int = 50) -> Estimate:
    """A score without values by question."""
    return over_seeds([Scores(value=value, stderr=stderr, n=n, better="higher")])


def drawn(n: int, seed: int, *, shift: float = 0.0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(shift, 1) for _ in range(n)]


def test_mcnemar_is_the_binomial_test_of_the_questions_that_differ() -> None:
    first = np.array([1.0] * 7 + [0.0] * 1 + [1.0] * 20 + [0.0] * 5)
    second = np.array([0.0] * 7 + [1.0] * 1 + [1.0] * 20 + [0.0] * 5)
    # Both tails of 8 throws of a coin with at most one head: 2 * (1 + 8) / 256.
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(18 / 256)
    assert mcnemar(first, first) == 1.0


@pytest.mark.parametrize("paired", [False, True])
def test_perplexities_of_a_ruined_model_have_no_known_error(paired: bool) -> None:
    losses = tuple(drawn(30, 0))
    first, second = (
        over_seeds([Scores(value=v, stderr=v / 9, n=30, better="lower", per_example=losses) for v in values])
        for values in ((1e260, 2e260), (1e260, 3e260))
    )
    found = difference(first, second, paired=paired)
    assert found.value == pytest.approx(0.5e260)
    assert (found.test, found.within_noise) == ("", None)


def test_holm_multiplies_by_the_tests_that_are_left_and_never_falls() -> None:
    found = holm([0.01, 0.04, math.nan, 0.03, 0.9])
    assert found[:2] == pytest.approx([0.04, 0.09])
    assert math.isnan(found[2])
    assert found[3:] == pytest.approx([0.09, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_values_on_the_same_questions_are_tested_by_their_differences() -> None:
    first = drawn(30, 0)
    second = [value + shift for value, shift in zip(first, drawn(30, 1, shift=0.3), strict=True)]
    found = difference(one(*first), one(*second), paired=True)
    known = stats.ttest_rel(second, first)
    shifts = np.array(second) - np.array(first)
    assert found.value == pytest.approx(shifts.mean())
    assert found.stderr == pytest.approx(shifts.std(ddof=1) / math.sqrt(30))
    assert (found.p, found.test, found.is_paired) == (pytest.approx(known.pvalue), "t", True)
    # Two ways to the same interval.
    assert (found.low, found.high) == pytest.approx(known.confidence_interval(0.95), abs=0.08)
    assert found.low < found.value < found.high


def test_values_on_other_questions_are_two_samples() -> None:
    first, second = drawn(20, 0), drawn(35, 1, shift=0.4)
    found = difference(one(*first), one(*second), paired=False)
    known = stats.ttest_ind(second, first, equal_var=False)
    interval = known.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((known.pvalue, interval.low, interval.high))
    assert not found.is_paired
    # As many values are no proof that they belong together, and other counts are proof that they do not.
    assert not difference(one(*first), one(*second[:20]), paired=False).is_paired
    assert not difference(one(*first), one(*second), paired=True).is_paired


def test_hits_are_tested_exactly_and_three_in_a_row_are_noise() -> None:
    before = [1.0] * 20
    few, many = [0.0] * 4 + [1.0] * 16, [0.0] * 6 + [1.0] * 14
    found = difference(one(*before), one(*few), paired=True)
    assert (found.test, found.p, found.within_noise) == ("McNemar", 2 / 2**4, True)
    # The bootstrap alone would have called it a difference.
    assert found.high < 0
    found = difference(one(*before), one(*many), paired=True)
    assert (found.p, found.within_noise) == (2 / 2**6, False)


def test_what_two_scores_share_is_taken_out_of_their_noise() -> None:
    # Not means of their values, as perplexity is not, yet correlated with them.
    rng = random.Random(0)
    rows = [[rng.gauss(2, 1) for _ in range(40)]]
    rows.append([value + rng.gauss(0, 0.1) for value in rows[0]])
    first, second = (
        over_seeds([Scores(value=value, stderr=0.5, n=40, better="lower", per_example=tuple(row))])
        for value, row in zip((8.0, 8.1), rows, strict=True)
    )
    r = statistics.correlation(*rows)
    paired, unpaired = (difference(first, second, paired=paired) for paired in (True, False))
    assert paired.stderr == pytest.approx(math.sqrt(0.25 + 0.25 - 2 * r * 0.25))
    assert unpaired.stderr == pytest.approx(math.sqrt(0.5))
    assert paired.low == pytest.approx(paired.value - stats.t.ppf(0.975, 39) * paired.stderr)
    # A base whose values are all alike shares nothing.
    flat = over_seeds([Scores(value=8.0, stderr=0.5, n=40, better="lower", per_example=(2.0,) * 40)])
    assert difference(flat, second, paired=True).stderr == pytest.approx(math.sqrt(0.5))


def test_the_correlation_formula_is_the_variance_of_differences_for_means() -> None:
    first, second = drawn(25, 3), drawn(25, 4)
    errors = [statistics.stdev(row) / 5 for row in (first, second)]
    r = statistics.correlation(first, second)
    known = math.sqrt(errors[0] ** 2 + errors[1] ** 2 - 2 * r * errors[0] * errors[1])
    assert difference(one(*first), one(*second), paired=True).stderr == pytest.approx(known)


def test_a_mean_over_seeds_has_the_error_of_seeds_and_questions() -> None:
    found = over_seeds([score(0, 1, 1, 0), score(1, 1, 1, 0), score(0, 1, 1, 1)])
    assert found.value == pytest.approx((0.5 + 0.75 + 0.75) / 3)
    assert found.spread == pytest.approx(statistics.stdev([0.5, 0.75, 0.75]))
    assert found.examples == pytest.approx((1 / 3, 1, 1, 1 / 3))
    assert found.by_question == pytest.approx(statistics.stdev([1 / 3, 1, 1, 1 / 3]) / 2)
    assert found.stderr == pytest.approx(math.sqrt(found.spread**2 / 3 + found.by_question**2))  # type: ignore[operator]
    assert (found.seeds, found.n) == (3, 4)


def test_seeds_whose_questions_are_not_kept_share_the_error_of_the_questions() -> None:
    scores = [Scores(value=value, stderr=0.04, n=100, better="higher") for value in (0.5, 0.6, 0.7)]
    found = over_seeds(scores)
    assert found.by_question == pytest.approx(0.04)
    assert found.stderr == pytest.approx(math.sqrt(0.1**2 / 3 + 0.04**2))


def test_few_seeds_have_few_degrees_of_freedom() -> None:
    hits = [[0, 0, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 1]]
    found = difference(over_seeds([score(*row) for row in hits]), one(*hits[1]), paired=True)
    rows = np.array(hits, dtype=float)
    questions = (rows[1] - rows.mean(axis=0)).var(ddof=1) / 8
    seeds = rows.mean(axis=1).var(ddof=1) / 2
    degrees = (questions + seeds) ** 2 / (questions**2 / 7 + seeds**2 / 1)
    assert found.stderr == pytest.approx(math.sqrt(questions + seeds))
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, degrees) * found.stderr)
    # Hits of one seed are tested by McNemar; a mean over two is no hit.
    assert found.test == "t"


def test_what_has_no_known_error_is_not_judged() -> None:
    for unknown in (alone(0.3, math.nan), alone(0.3, 0.0), one(1.0), alone(math.nan, 0.1), alone(math.inf, 0.1)):
        found = difference(one(0.0, 1.0, 1.0), unknown, paired=True)
        assert (found.within_noise, found.test) == (None, "")
        assert math.isnan(found.p)
        assert math.isnan(found.low)
    # Values that are all alike are an error of 0 that is known.
    assert difference(one(1, 1, 1, 1, 1, 1), one(0, 0, 0, 0, 0, 0), paired=True).p == 2 / 2**6


def test_no_test_claims_more_than_its_questions_can_show() -> None:
    first = [0.1, 0.2, 0.3, 0.25]
    found = difference(one(*first), one(*[value + 0.5 for value in first]), paired=True)
    assert found.p == pytest.approx(2 / 2**4)
    assert found.within_noise


def test_equal_scores_and_rounding_are_no_difference() -> None:
    values = drawn(20, 5, shift=3)
    same = difference(one(*values), one(*values), paired=True)
    assert (same.value, same.low, same.high, same.p, same.within_noise) == (0, 0, 0, 1, True)
    rounded = difference(one(*values), one(*[value * (1 + 1e-8) for value in values]), paired=True)
    assert rounded.value > 0
    assert (rounded.p, rounded.within_noise) == (1, True)


def test_a_difference_is_noise_if_interval_or_test_says_so() -> None:
    def found(low: float, high: float, p: float) -> bool | None:
        return Difference(value=1.0, stderr=1.0, low=low, high=high, p=p, test="t", is_paired=True).within_noise

    assert [found(0.1, 2.0, 0.04), found(-0.1, 2.0, 0.04), found(0.1, 2.0, 0.06), found(-2.0, -0.1, 0.04)] == [
        False, True, True, False,
    ]  # fmt: skip


def test_the_bootstrap_repeats_whatever_fits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array(drawn(50, 6))
    whole = bootstrap(values, np.random.default_rng(1))
    monkeypatch.setattr(significance, "_BLOCK", 50 * 7)
    assert bootstrap(values, np.random.default_rng(1)) == whole
    assert bootstrap(values, np.random.default_rng(2)) != whole
    with pytest.raises(InvalidValueError, match=r"at least two values\. Got 1"):
        bootstrap(np.array([1.0]), np.random.default_rng(0))


@pytest.mark.parametrize("n", [8, 40])
def test_the_interval_of_the_bootstrap_covers_the_truth(n: int) -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(500):
        # How one question moves: most stay, more are lost than won. The mean is -0.2.
        values = rng.choice([-1.0, 0.0, 1.0], size=n, p=[0.4, 0.4, 0.2])
        low, high = bootstrap(values, rng, draws=400)
        covered += low <= -0.2 <= high
    # Two standard deviations of 500 draws of 95 % are 0.02; hits of few questions come in steps, which costs some.
    assert 0.92 <= covered / 500 <= 0.985


def test_seeds_that_differ_are_noise_and_looking_at_one_seed_hides_it() -> None:
    rng = np.random.default_rng(0)

    def runs(questions: np.ndarray, seeds: int) -> list[Scores]:
        rows = questions + rng.normal(0, 0.1, size=(seeds, 1)) + rng.normal(0, 0.2, size=(seeds, len(questions)))
        return [score(*row.tolist()) for row in rows]

    noise = {1: 0, 3: 0}
    for _ in range(100):
        questions = rng.normal(0.5, 0.3, size=40)
        for seeds in noise:
            first, second = (over_seeds(runs(questions, seeds)) for _ in range(2))
            noise[seeds] += bool(difference(first, second, paired=True).within_noise)
    # Both columns are the same method, so all that differs is noise.
    assert noise[3] / 100 >= 0.9
    assert noise[1] / 100 < 0.6


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="at least one score"):
        over_seeds([])
