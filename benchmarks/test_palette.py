"""Palettes: images to tokens, one step of k-means, and a whole fit."""

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Case, Close, Exact, Goal, Score, served_by
from benchmarks.pictures import photographs
from igpt_fast import Palette, ops
from igpt_fast.kmeans import histogram
from igpt_fast.reference.palette import kmeans_step, palette_assign


def palette_for(images, colors, device):
    """Centres such as k-means finds: near the images' colours, but between the 8-bit levels, where ties are rare."""
    rng = np.random.default_rng(1)
    pixels = np.unique(images.reshape(-1, 3), axis=0)
    levels = rng.choice(pixels, colors, replace=False) + rng.uniform(-0.5, 0.5, (colors, 3))
    return torch.from_numpy((levels / 127.5 - 1).clip(-1, 1).astype(np.float32)).to(device)


@pytest.mark.parametrize("kind", ["photographs", "random colours"])
def test_encode(compare, device, quick, kind):
    count, colors = (4, 64) if quick else (8192 if device == "cuda" else 1024, 512)
    images = photographs(count)
    centers = palette_for(images[:1024], colors, device)
    if kind == "random colours":
        images = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    palette, batch = Palette(centers.cpu()), torch.from_numpy(images).to(device)
    goal = Goal("palette encode, 8-bit images", lambda e: e.get("rates", {}).get("Mpixel/s"), 20.0, "Mpixel/s")
    if device == "cuda":
        others = peers.assign_on_gpu(batch.view(-1, 3), centers)
    else:
        others = peers.assign(images.reshape(-1, 3), centers)
        others["HF ImageGPT processor"] = peers.hf_processor(images, centers)
    compare(
        Case(
            op=f"palette encode, {kind}",
            shape=f"{count} images of 32 × 32, {colors} colours",
            dtype="uint8",
            device=device,
            backend=served_by("palette_assign", batch),
            ours=lambda: palette.encode(batch),
            peers=others,
            judge=Exact(palette_assign(batch, centers)),
            work={"Mpixel/s": batch.numel() / 3},
            goals=[goal] if device == "cpu" and kind == "photographs" else [],
            seconds=15.0,
            rounds=(3, 60),
            pause=0.02,
        )
    )


def test_decode(compare, device, quick):
    count, colors = (4, 64) if quick else (1024, 512)
    palette = Palette(torch.rand(colors, 3) * 2 - 1)
    tokens = torch.randint(0, colors, (count, 32, 32), dtype=torch.int16, device=device)
    index, table = tokens.long(), palette.decode(torch.arange(colors, device=device))
    theirs, numpys = index.cpu().numpy(), table.cpu().numpy()
    compare(
        Case(
            op="palette decode",
            shape=f"{count} images of 32 × 32, {colors} colours",
            dtype="int16",
            device=device,
            backend=served_by("palette_decode", tokens),
            ours=lambda: palette.decode(tokens),
            peers={"torch indexing": lambda: table[index], "numpy take": lambda: numpys.take(theirs, axis=0)},
            judge=Exact(table[index]),
            work={"Mpixel/s": tokens.numel()},
            pause=0.02,
        )
    )


def test_histogram(compare, device, quick):
    images = photographs(4 if quick else 1024)
    batch = torch.from_numpy(images).to(device)

    def bincount():
        r, g, b = batch.view(-1, 3).int().unbind(1)
        return torch.bincount(r << 16 | g << 8 | b, minlength=1 << 24)

    def unique():
        r, g, b = images.reshape(-1, 3).astype(np.uint32).T
        found, times = np.unique(r << 16 | g << 8 | b, return_counts=True)
        counts = np.zeros(1 << 24, np.int64)
        counts[found] = times
        return counts

    compare(
        Case(
            op="color_histogram",
            shape=f"{batch.numel() // 3} pixels of photographs",
            dtype="uint8",
            device=device,
            backend=served_by("color_histogram", batch),
            ours=lambda: ops.color_histogram(batch),
            peers={"torch bincount": bincount, "numpy unique": unique},
            judge=Exact(bincount()),
            work={"Mpixel/s": batch.numel() / 3},
            pause=0.02,
        )
    )


def test_kmeans_step(compare, device, quick):
    found, times, _ = histogram([photographs(16 if quick else 512)])
    centers = palette_for(found, 64 if quick else 512, device)
    colors, weights = torch.from_numpy(found).to(device), torch.from_numpy(times).to(device)
    sums, counts, _ = kmeans_step(colors, weights, centers)
    if device == "cuda":
        others = peers.lloyd_step_on_gpu(colors, weights, centers)
    else:
        others = peers.lloyd_step(found, times, centers)
    compare(
        Case(
            op="kmeans_step",
            shape=f"{len(found)} weighted colours, {len(centers)} centres",
            dtype="uint8",
            device=device,
            backend=served_by("kmeans_step", colors, centers),
            ours=lambda: ops.kmeans_step(colors, weights, centers)[:2],
            peers=others,
            # Sums of integers, so float64 holds the truth exactly; a peer may give a pixel in a tie to another centre.
            judge=Close([sums, counts], torch.float32),
            work={"Mpixel/s": len(found)},
            seconds=8.0,
            pause=0.02,
        )
    )


def test_fit(compare, quick):
    """To convergence, each by its own rule, then all judged by one: the mean squared distance of all pixels."""
    count, colors = (16, 16) if quick else (2930, 512)  # 3.0 million pixels
    images = photographs(count)
    found, times, _ = histogram([images])
    every, weights = torch.from_numpy(found), torch.from_numpy(times)

    def inertia(result):
        centers = result.centers if isinstance(result, Palette) else torch.as_tensor(result).float() / 127.5 - 1
        return float(ops.kmeans_step(every, weights, centers)[2]) / (images.size / 3)

    def against(entry):
        theirs = entry["peers"]["scikit-learn KMeans"].get("inertia")
        return entry["inertia"] / theirs if theirs else None

    spread = float((weights[:, None] * (every.double() / 127.5 - 1).square()).sum()) / (images.size / 3)
    compare(
        Case(
            op="palette fit",
            shape=f"{images.size // 3} pixels, {colors} colours",
            dtype="uint8",
            backend=served_by("kmeans_step", every),
            ours=lambda: Palette.fit(images, colors=colors),
            peers=peers.fit(images.reshape(-1, 3), colors),
            judge=Score(inertia, most=spread / colors**0.5, most_peer=spread / colors**0.5),
            work={"Mpixel/s": images.size / 3},
            goals=[
                Goal("Palette.fit, 3 million pixels, 512 colours", lambda e: e.get("seconds"), 20.0, "s", "at most"),
                Goal("its inertia against scikit-learn's KMeans(n_init=1)", against, 1.01, "×", "at most"),
            ],
            extra=lambda side, result: {"inertia": inertia(result)},
            rounds=(3, 3),
            note=f"{len(found)} distinct colours",
        )
    )
