"""Fitting palettes: k-means that settles, gives the same bits for the same seed, and says what it could not do."""

import logging

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
def test_fit_descends_until_it_is_settled(monkeypatch, colors):
    seen, steps = [], []

    def recorded(*args):
        seen.append(ops.kmeans_step(*args))
        return seen[-1]

    monkeypatch.setattr(kmeans, "kmeans_step", recorded)
    pixels = photo(30_000)
    palette = Palette.fit(pixels, colors=colors, progress=lambda *step: steps.append(step))
    inertias = np.array([float(inertia) for _, _, inertia in seen])
    assert (np.diff(inertias) <= 1e-12 * inertias[0]).all() and inertias[-1] < inertias[0]
    assert steps == [(i + 1, kmeans.MAX_STEPS) for i in range(len(seen) - 1)] and len(steps) < kmeans.MAX_STEPS
    sums, counts, _ = seen[-1]
    moved = (sums / counts[:, None] / 127.5 - 1 - palette.centers).abs().max()
    assert counts.min() > 0 and moved <= 2 * kmeans.SETTLED
    squared = (pixels / 127.5 - 1 - palette.centers.numpy()[palette.encode(pixels)]) ** 2
    assert palette.inertia == pytest.approx(squared.sum(1).mean(), rel=1e-6)


def test_fit_is_as_good_as_scikit_learn():
    pixels = photo(20_000, seed=1)
    theirs = KMeans(n_clusters=64, n_init=1, random_state=0).fit(pixels / 127.5 - 1).inertia_ / len(pixels)
    assert Palette.fit(pixels, colors=64).inertia <= 1.01 * theirs


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


def test_fit_says_when_it_stops_early(monkeypatch, caplog):
    monkeypatch.setattr(kmeans, "MAX_STEPS", 2)
    with caplog.at_level(logging.WARNING):
        Palette.fit(photo(3000), colors=50)
    assert "k-means stopped after 2 steps" in caplog.text


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
