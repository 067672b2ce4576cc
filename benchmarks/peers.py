"""What a user would pick instead of us, each given its best settings. What is not here is Missing, with the reason.

A peer is a callable of no arguments, ready to be timed. The peers of whole models are in peer_models.py.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Call, Missing, Once

Peers = dict[str, Call | Once | Missing]

SDPA = F.scaled_dot_product_attention


def optional(module: str) -> Any:
    """The module, or Missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return Missing(f"not installed ({error})")


def compiled(fn: Callable, quick: bool, **options: Any) -> Callable | Missing:
    """torch.compile of fn, or why there is none: each graph takes seconds of a compiler that some machines lack."""
    if quick:
        return Missing("left out of a quick run")
    global _toolchain
    if _toolchain is None:
        try:  # where the peers will run: a CPU's compiler takes half a minute that a GPU's peers need not wait for
            torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device="cuda" if torch.cuda.is_available() else "cpu"))
            _toolchain = ""
        except Exception as error:  # there is no one kind of error for a machine where it cannot work
            _toolchain = (
                f"torch.compile does not work here: {next(iter(str(error).splitlines()), type(error).__name__)}"
            )
    if _toolchain:
        return Missing(_toolchain)
    torch._dynamo.reset()  # another shape is another graph, and their number is limited
    torch._functorch.config.donated_buffer = False  # a backward pass is timed many times over one graph
    return torch.compile(fn, dynamic=False, **options)


_toolchain: str | None = None


def liger(name: str) -> Any:
    """Liger's Triton kernel of that name, which needs a GPU, or Missing."""
    functional = optional("liger_kernel.transformers.functional")
    return functional if isinstance(functional, Missing) else getattr(functional, f"liger_{name}")


def call(fn: Callable | Missing, *args: Any) -> Call | Missing:
    """fn(*args), ready to be timed."""
    return fn if isinstance(fn, Missing) else lambda: fn(*args)


def backward(forward: Call | Missing, inputs: Iterable[Tensor], grads: Tensor | Iterable[Tensor]) -> Call | Missing:
    """The backward pass alone, over a graph that forward made once."""
    if isinstance(forward, Missing):
        return forward
    out, inputs = forward(), list(inputs)
    return lambda: torch.autograd.grad(out, inputs, grads, retain_graph=True)


def quick_gelu(x: Tensor) -> Tensor:
    """The activation as anybody would write it."""
    return x * torch.sigmoid(1.702 * x)


def assign(pixels: np.ndarray, centers: Tensor) -> Peers:
    """Tokens of uint8 [N, 3] by the nearest of centers float32 [K, 3] in [-1, 1].

    Whoever takes numbers of any scale is spared the division by 127.5: his palette is stretched to 0..255 beforehand.
    """
    levels = np.ascontiguousarray((centers.numpy() + 1) * 127.5, np.float32)
    palette = torch.from_numpy(levels)

    def torch_cdist() -> Tensor:
        parts = torch.from_numpy(pixels).split(1 << 16)  # distances of 65,536 pixels stay in reach of the caches
        return torch.cat([torch.cdist(part.float(), palette).argmin(1) for part in parts])

    peers: Peers = {"torch cdist + argmin": torch_cdist}
    metrics = optional("sklearn.metrics")
    peers["scikit-learn pairwise_distances_argmin"] = (
        metrics if isinstance(metrics, Missing)
        else lambda: metrics.pairwise_distances_argmin(pixels.astype(np.float32), levels)
    )  # fmt: skip
    spatial = optional("scipy.spatial")
    if isinstance(spatial, Missing):
        peers["scipy cKDTree"] = spatial
    else:
        tree = spatial.cKDTree(levels)
        peers["scipy cKDTree"] = lambda: tree.query(pixels, workers=-1)[1]
    faiss = optional("faiss")
    if isinstance(faiss, Missing):
        peers["faiss IndexFlatL2"] = faiss
    else:
        index = faiss.IndexFlatL2(3)
        index.add(levels)
        peers["faiss IndexFlatL2"] = lambda: index.search(pixels.astype(np.float32), 1)[1][:, 0]
    return peers


def assign_on_gpu(pixels: Tensor, centers: Tensor) -> Peers:
    """The same for uint8 [N, 3] that a GPU holds."""
    levels = (centers + 1) * 127.5

    def torch_cdist() -> Tensor:
        return torch.cat([torch.cdist(part.float(), levels).argmin(1) for part in pixels.split(1 << 20)])

    flash = optional("flash_kmeans.assign_euclid_triton")

    def theirs() -> Tensor:
        points = pixels[None].float()
        return flash.euclid_assign_triton(points, levels[None], (points * points).sum(-1))[0]

    return {"torch cdist + argmin": torch_cdist, "flash-kmeans": flash if isinstance(flash, Missing) else theirs}


def hf_processor(images: np.ndarray, centers: Tensor) -> Call | Missing:
    """Hugging Face's own way from uint8 [N, H, W, 3] to tokens, without its resizing."""
    # The variant that works with PIL: the other one needs torchvision, and computes the same formula.
    module = optional("transformers.models.imagegpt.image_processing_pil_imagegpt")
    if isinstance(module, Missing):
        return module
    processor = module.ImageGPTImageProcessorPil(clusters=centers.numpy(), do_resize=False)
    # Eight images at a time: it holds several float64 matrices of [pixels, colours].
    batches = [list(images[start : start + 8]) for start in range(0, len(images), 8)]
    return lambda: np.concatenate([np.stack(processor(batch)["input_ids"]) for batch in batches]).reshape(-1)


def fit(pixels: np.ndarray, colors: int, seed: int = 0) -> Peers:
    """Palettes, float [K, 3] in 0..255, of uint8 [N, 3]; inertia tells them apart. Run once each, for they take long.

    All get the distinct colours with the number of their pixels as weights, a third of the work for the same objective,
    though a user must know to do that.
    """

    def distinct() -> tuple[np.ndarray, np.ndarray]:
        packed, times = np.unique(
            pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32), return_counts=True
        )
        return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.float32), times.astype(np.float32)

    def whole() -> np.ndarray:
        points, weights = distinct()
        return cluster.KMeans(colors, n_init=1, random_state=seed).fit(points, sample_weight=weights).cluster_centers_

    def parts() -> np.ndarray:
        points, weights = distinct()
        means = cluster.MiniBatchKMeans(colors, n_init=1, batch_size=4096, random_state=seed)
        return means.fit(points, sample_weight=weights).cluster_centers_

    def theirs() -> np.ndarray:
        points, weights = distinct()
        # By default it would look at 256 points a colour only, and take 25 steps.
        means = faiss.Kmeans(3, colors, niter=60, seed=seed, max_points_per_centroid=len(points))
        means.train(points, weights)
        return means.centroids

    cluster, faiss = optional("sklearn.cluster"), optional("faiss")
    sides = {
        "scikit-learn KMeans": (cluster, whole),
        "scikit-learn MiniBatchKMeans": (cluster, parts),
        "faiss Kmeans": (faiss, theirs),
    }
    return {name: module if isinstance(module, Missing) else Once(run) for name, (module, run) in sides.items()}


def lloyd_step(colors: np.ndarray, weights: np.ndarray, centers: Tensor) -> Peers:
    """One weighted step of Lloyd's algorithm up to the division: sums [K, 3] in 0..255 units, counts [K]."""
    levels = np.ascontiguousarray((centers.numpy() + 1) * 127.5, np.float32)

    def sums(nearest: np.ndarray) -> tuple[Tensor, Tensor]:
        counts = np.bincount(nearest, weights, len(levels))
        total = [np.bincount(nearest, weights * colors[:, axis], len(levels)) for axis in range(3)]
        return torch.from_numpy(np.stack(total, 1)), torch.from_numpy(counts)

    finders = assign(colors, centers)
    wanted = ("torch cdist + argmin", "scikit-learn pairwise_distances_argmin", "faiss IndexFlatL2")
    return {f"{name} + numpy bincount": _then(finders[name], sums) for name in wanted}


def lloyd_step_on_gpu(colors: Tensor, weights: Tensor, centers: Tensor) -> Peers:
    """The same for what a GPU holds."""

    def sums(nearest: Tensor) -> tuple[Tensor, Tensor]:
        nearest = nearest.long()
        counts = torch.zeros(len(centers), dtype=torch.int64, device=colors.device).index_add_(0, nearest, weights)
        total = torch.zeros(centers.shape, dtype=torch.int64, device=colors.device)
        return total.index_add_(0, nearest, colors * weights[:, None]), counts

    def both(find: Call) -> Call:
        return lambda: sums(find())

    found = assign_on_gpu(colors, centers).items()
    return {f"{name} + index_add": f if isinstance(f, Missing) else both(f) for name, f in found}


def _then(find: Call | Missing, use: Callable[[np.ndarray], Any]) -> Call | Missing:
    return find if isinstance(find, Missing) else lambda: use(np.asarray(find()))
