"""Fitting palettes: k-means that settles, gives the same bits for the same seed, and says what it could not do."""

import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from igpt_fast import InputError, Palette, kmeans, ops


def photo(n: int, seed: int = 0) -> np.ndarray:
    """uint8 [n, 3]: colours in some thirty soft clouds of very different weight."""
    rng = np.random.default_rng(seed)
    middles, weights = rng.uniform(20, 235, (30, 3)), rng.exponential(size=30) ** 2
    cloud = rng.choice(30, n, p=weights / weights.sum())
    return np.clip(middles[cloud] + rng.normal(size=(n, 3)) * rng.uniform(3, 20, 30)[cloud, None], 0, 255).astype(
        np.uint8
    )


def test_fit_is_reproducible_to_the_bit():
    pixels = photo(40_000)
    palette = Palette.fit(pixels.reshape(2, 100, 200, 3), colors=40, seed=3)
    assert len(palette) == 40 and palette.centers.abs().max() <= 1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        batches = (torch.from_numpy(part.copy()) for part in np.array_split(pixels[::-1], 7))
        again = Palette.fit(batches, colors=40, seed=3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again.centers, palette.centers) and again.inertia == palette.inertia
    assert not torch.equal(Palette.fit(pixels, colors=40, seed=4).centers, palette.centers)


@pytest.mark.parametrize("colors", [2, 3, 48, 200])
def test_lloyd_descends_until_it_is_settled(monkeypatch, colors):
    seen, steps = [], []

    def recorded(*args):
        seen.append(ops.kmeans_step(*args))
        return seen[-1]

    monkeypatch.setattr(kmeans, "kmeans_step", recorded)
    monkeypatch.setattr(kmeans, "_exchange", lambda *args: None)
    pixels = photo(30_000)
    palette = Palette.fit(pixels, colors=colors, progress=lambda *step: steps.append(step))
    inertias = np.array([float(inertia) for _, _, inertia in seen])
    assert (np.diff(inertias) <= 1e-12 * inertias[0]).all() and inertias[-1] < inertias[0]
    assert steps == [(i + 1, kmeans.MAX_STEPS) for i in range(len(seen) - 2)] and len(steps) < kmeans.MAX_STEPS
    assert palette.inertia == inertias[-1] / len(pixels)


@pytest.mark.parametrize("colors", [2, 5, 48, 200])
def test_fit_leaves_its_centres_at_the_means_of_their_colours(colors):
    pixels = photo(30_000)
    palette = Palette.fit(pixels, colors=colors)
    x, tokens, centers = pixels / 127.5 - 1, palette.encode(pixels), palette.centers.numpy()
    assert palette.inertia == pytest.approx(((x - centers[tokens]) ** 2).sum(1).mean(), rel=1e-6)
    means = np.array([x[tokens == token].mean(0) for token in range(colors)])
    assert np.abs(means - centers).max() <= 0.1 / 127.5  # a tenth of an 8-bit level


def test_exchanges_mend_a_bad_start(monkeypatch):
    pixels = photo(20_000, seed=1)
    good = Palette.fit(pixels, colors=64).inertia
    # All centres but one start within a cube of 12 levels: Lloyd alone leaves most of them near.
    start = np.concatenate([np.mgrid[100:112:3, 100:112:3, 100:112:3].reshape(3, -1).T[:63], [[250, 250, 250]]])
    monkeypatch.setattr(kmeans, "_start", lambda *args: start.astype(np.uint8))
    mended = Palette.fit(pixels, colors=64).inertia
    monkeypatch.setattr(kmeans, "_exchange", lambda *args: None)
    assert mended <= 1.1 * good < Palette.fit(pixels, colors=64).inertia


def test_an_exchange_that_is_no_gain_is_not_kept(monkeypatch):
    pixels = photo(3000)
    monkeypatch.setattr(kmeans, "_exchange", lambda *args: None)
    without = Palette.fit(pixels, colors=16)
    monkeypatch.setattr(kmeans, "_exchange", lambda colors, weights, centers: torch.ones_like(centers))
    assert torch.equal(Palette.fit(pixels, colors=16).centers, without.centers)


def test_fit_is_as_good_as_scikit_learn():
    pixels = photo(20_000, seed=1)
    theirs = KMeans(n_clusters=64, n_init=1, random_state=0).fit(pixels / 127.5 - 1).inertia_ / len(pixels)
    assert Palette.fit(pixels, colors=64).inertia <= theirs


def test_fit_starts_from_a_sample_of_many_colours(monkeypatch):
    monkeypatch.setattr(kmeans, "SAMPLE", 2000)
    pixels = photo(20_000, seed=1)
    sampled = Palette.fit(pixels, colors=64).inertia
    monkeypatch.undo()
    assert sampled <= 1.03 * Palette.fit(pixels, colors=64).inertia
    # One colour fills the sample; the start takes the others from all there are.
    monkeypatch.setattr(kmeans, "SAMPLE", 8)
    strewn = np.concatenate([np.zeros((100_000, 3), np.uint8), photo(300)])
    palette = Palette.fit(strewn, colors=30)
    assert len(np.unique(palette.encode(strewn))) == 30


def test_fit_gives_idle_centres_new_colours(monkeypatch):
    pixels = photo(3000)
    monkeypatch.setattr(kmeans, "_start", lambda colors, weights, k, rng: np.repeat(colors[:1], k, 0))
    palette = Palette.fit(pixels, colors=12)
    assert len(np.unique(palette.encode(pixels))) == 12


def test_parts_of_the_start():
    rng = np.random.default_rng(0)
    drawn, times = kmeans._draw(np.array([0, 5, 0, 3]), 8000, rng)
    assert drawn.tolist() == [1, 3] and abs(times[0] - 5000) < 200
    # What stands for pixels that are nearly all white has their mean and their scatter.
    colors, weights, _ = kmeans.histogram([np.concatenate([np.full((400_000, 3), 250, np.uint8), photo(60_000)])])
    assert len(colors) > kmeans.SAMPLE
    among, stands_for = kmeans._sample(colors, weights, rng)
    for moment in (colors.astype(float), colors.astype(float) ** 2):
        wanted = np.average(moment, axis=0, weights=weights)
        assert np.allclose(np.average(moment[among], axis=0, weights=stands_for), wanted, rtol=0.01)
    assert (stands_for[colors[among].min(1) < 240] > 0).sum() > 10_000
    # The best of several draws beats plain k-means++, whose draws are single.
    x = photo(2000).astype(float)
    greedy, plain = [], []
    for _ in range(8):
        chosen = [0]
        while len(chosen) < 40:
            nearest = ((x[:, None] - x[chosen]) ** 2).sum(2).min(1)
            chosen.append(rng.choice(len(x), p=nearest / nearest.sum()))
        for picked, found in ((chosen, plain), (kmeans._spread(x, np.ones(len(x), int), 40, rng), greedy)):
            found.append(((x[:, None] - x[picked]) ** 2).sum(2).min(1).sum())
    assert np.mean(greedy) < 0.93 * np.mean(plain)


def test_parts_of_the_descent():
    colors = np.array([[9, 9, 9], [10, 10, 10], [100, 0, 0], [140, 0, 0], [250, 0, 0], [0, 0, 251]], np.uint8)
    centers = kmeans.unit(np.array([[9, 9, 9], [10, 10, 10], [120, 0, 0], [250, 0, 0], [0, 0, 250]]))
    # One of the two dark centres, the one that fewer pixels miss, goes to where 100 and 140 share a centre.
    changed = kmeans._exchange(colors, np.array([2, 3, 5, 5, 1, 1]), centers)
    wanted = centers.clone()
    wanted[0], wanted[2] = kmeans.unit(np.array([[140, 0, 0], [100, 0, 0]]))
    assert torch.allclose(changed, wanted, atol=1e-6)
    assert kmeans._exchange(colors[[0, 2, 4, 5]], np.ones(4, int), kmeans.unit(colors[[0, 2, 4, 5]])) is None
    assert torch.equal(kmeans._farthest(torch.from_numpy(colors), centers[:2], 2), kmeans.unit(colors[[5, 4]]))


def test_fit_says_when_it_stops_early(monkeypatch, caplog):
    monkeypatch.setattr(kmeans, "MAX_STEPS", 22)
    monkeypatch.setattr(kmeans, "EXCHANGES", 0)
    with caplog.at_level(logging.WARNING):
        Palette.fit(photo(30_000), colors=200)
    [told] = [record.getMessage() for record in caplog.records]
    found = re.fullmatch(r"k-means stopped after 22 steps; a centre still moved by ([\d.]+) of 255 levels", told)
    assert 0.05 <= float(found[1]) < 25, "it goes on until none moves by more than a twentieth"


@given(st.sets(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=12), st.integers(2, 14))
@settings(max_examples=12)
def test_fit_of_few_colours_is_exact(colors, wanted):
    colors = np.array(sorted(colors), np.uint8)
    pixels = colors.repeat(3, 0)
    palette = Palette.fit(pixels, colors=wanted)
    assert len(palette) == min(wanted, len(colors))
    if len(colors) <= wanted:
        assert palette.inertia == 0 and np.array_equal(palette.decode(palette.encode(pixels)), pixels)


def test_fit_says_that_colours_are_few(caplog):
    image = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3)
    with caplog.at_level(logging.WARNING):
        assert len(Palette.fit(image, colors=25)) == 25 and not caplog.text
        assert len(Palette.fit(image, colors=512)) == 25
    assert "25 distinct colours, fewer than the 512 asked for" in caplog.text


@pytest.mark.parametrize(
    ("images", "colors", "message"),
    [
        (np.zeros((0, 3), np.uint8), 8, "no pixels"),
        ([], 8, "no pixels"),
        (np.zeros((4, 3), np.float32), 8, r"not float32 \[4, 3\]"),
        (np.zeros((4, 4), np.uint8), 8, r"not uint8 \[4, 4\]"),
        (["photo.png"], 8, "not str"),
        (np.zeros((4, 3), np.uint8), 1, "from 2 to 4096"),
        (np.zeros((4, 3), np.uint8), 4097, "from 2 to 4096"),
    ],
)
def test_fit_refuses(images, colors, message):
    with pytest.raises(InputError, match=message):
        Palette.fit(images, colors=colors)
