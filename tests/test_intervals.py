"""95 % intervals hold the truth 95 times in 100: of independent values, and of values that come in groups."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast.intervals import T95, _t95, margin_of_mean, of_share


@pytest.mark.parametrize("count", [2, 5, 31, 40, 200])
def test_the_interval_holds_the_mean_95_times_in_100(count):
    draws = np.random.default_rng(count).normal(3, 2, (4000, count))
    held = np.mean([abs(row.mean() - 3) <= margin_of_mean(row) for row in draws])
    assert abs(held - 0.95) < 0.015
    assert margin_of_mean(draws[0, :1]) is None


@pytest.mark.parametrize(("count", "t"), [(2, 12.7062), (30, 2.0452), (31, 2.0423), (32, 2.0395), (33, 2.0369)])
def test_the_interval_is_of_students_t_in_the_table_and_above(count, t):
    values = np.arange(count)
    assert margin_of_mean(values) == pytest.approx(t * values.std(ddof=1) / math.sqrt(count), rel=3e-4)


def test_the_table_is_students():
    stats = pytest.importorskip("scipy.stats", reason="it comes with the [probe] extra")
    assert [_t95(freedom) for freedom in range(1, 31)] == [round(stats.t.ppf(0.975, n), 3) for n in range(1, 31)]
    above = np.arange(31, 400)
    assert [_t95(int(n)) for n in above] == pytest.approx(list(stats.t.ppf(0.975, above)), abs=2e-4)


@pytest.mark.parametrize(("right", "groups"), [([5, 1, 4, 2], 4), ([6, 0, 6], 3), ([3, 3, 3, 3, 2], 5), ([6, 6], 2)])
def test_a_share_counts_as_one_of_so_many_independent_images(right, groups):
    """Those that would have its error, or, where all are right, the groups; and fewer for t's sake."""
    of = np.repeat(np.arange(groups), 6)
    is_right = np.concatenate([np.arange(6) < k for k in right])
    share, off = is_right.mean(), np.array(right) - 6 * is_right.mean()
    variance, independent = (off**2).sum() * groups / (groups - 1) / len(of) ** 2, share * (1 - share) / len(of)
    count = len(of) * min(1.0, independent / variance) if independent else groups
    count *= (1.959964 / T95[groups - 2]) ** 2
    z2 = 1.959964**2 / count
    reach = math.sqrt(z2 * share * (1 - share) + z2**2 / 4)
    want = [(share + z2 / 2 + sign * reach) / (1 + z2) for sign in (-1, 1)]
    assert of_share(is_right, of) == pytest.approx(want, rel=1e-9)


def test_wilsons_interval():
    assert of_share(np.arange(10) < 8) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@given(st.integers(1, 500), st.data())
def test_the_interval_of_a_share_holds_it_and_narrows(count, data):
    part = data.draw(st.integers(0, count))
    (low, high), (lower, higher) = (of_share(np.arange(k * count) < k * part) for k in (1, 4))
    assert 0 <= low <= part / count <= high <= 1
    assert higher - lower < high - low


@pytest.mark.parametrize("groups", [6, 15, 40])
def test_values_in_groups(groups):
    """Values of a group share most of what is random in them: taken as independent they promise far too much."""
    random, of = np.random.default_rng(groups), np.repeat(np.arange(groups), 10)
    draws = random.normal(0, 1, (2000, groups))[:, of] + random.normal(0, 0.5, (2000, len(of)))
    held, naive = (np.mean([abs(row.mean()) <= margin_of_mean(row, by) for row in draws]) for by in (of, None))
    assert abs(held - 0.95) < 0.015 and naive < 0.6
    assert margin_of_mean(draws[0], np.zeros(len(of))) is None


@pytest.mark.parametrize("groups", [4, 10, 20, 50])
def test_groups_of_very_unequal_sizes(groups):
    """As slices of patients: the largest have a third of all, and their own mean in that of all."""
    random = np.random.default_rng(groups)
    held = right_held = 0
    for _ in range(2000):
        sizes = np.maximum(1, random.lognormal(1.5, 1.2, groups).round()).astype(int)
        of = np.repeat(np.arange(groups), sizes)
        values = random.normal(0, 1, groups)[of] + random.normal(0, 0.5, len(of))
        held += abs(values.mean()) <= margin_of_mean(values, of)
        right = random.random(len(of)) < random.beta(1.6, 0.7, groups)[of]  # a share of 0.7
        low, high = of_share(right, of)
        right_held += low <= 1.6 / 2.3 <= high
    assert 0.92 < held / 2000 < 0.98 and right_held / 2000 > 0.915


def test_the_table_between_whole_numbers_is_never_too_low():
    stats = pytest.importorskip("scipy.stats", reason="it comes with the [probe] extra")
    freedoms = np.linspace(1, 35, 400)
    found, wanted = np.array([_t95(freedom) for freedom in freedoms]), stats.t.ppf(0.975, freedoms)
    assert (found > wanted - 6e-4).all() and (found < 1.2 * wanted).all()


@pytest.mark.parametrize(("groups", "share"), [(6, 0.5), (15, 0.7), (40, 0.9)])
def test_right_answers_in_groups(groups, share):
    random, sizes = np.random.default_rng(groups), np.arange(groups) % 9 + 2
    of = random.permutation(np.repeat(np.arange(groups), sizes))
    a = 2.0  # of the beta distribution of a group's share of right answers
    right = random.random((2000, len(of))) < random.beta(a * share, a * (1 - share), (2000, groups))[:, of]
    found, naive = (np.array([of_share(row, by) for row in right]) for by in (of, None))
    held, promised = (np.mean((low <= share) & (share <= high)) for low, high in (found.T, naive.T))
    assert 0.92 < held <= 0.995 and promised < 0.85


@given(st.integers(1, 60), st.integers(0, 10**6))
def test_groups_only_ever_widen(count, seed):
    random = np.random.default_rng(seed)
    right, groups = random.random(count) < random.random(), random.integers(0, random.integers(1, count + 1), count)
    (low, high), (lower, higher) = of_share(right), of_share(right, groups)
    assert 0 <= lower <= low <= high <= higher <= 1
    assert len(np.unique(groups)) > 1 or (lower, higher) == (0, 1)


def test_what_is_all_right_counts_by_groups():
    few, many = (of_share(np.ones(1000, bool), np.arange(1000) % groups) for groups in (4, 400))
    assert few[0] < 0.4 < 0.98 < many[0] and few[1] == many[1] == 1


def test_groups_of_one_are_nearly_none():
    values, each = np.random.default_rng(0).normal(size=300), np.random.default_rng(1).permutation(300)
    assert margin_of_mean(values, each) == pytest.approx(margin_of_mean(values), rel=1e-12)
    assert of_share(values > 0, each) == pytest.approx(of_share(values > 0), abs=1e-3)
