"""Sampling: draw images pixel by pixel, from nothing or from the top of given ones.

The same seed gives the same images whatever the batch. Each image draws from a random stream of its own, every op of a
decoding step treats each row alone, and what is known is prefilled one image at a time, so no bit of an image depends
on its neighbours.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from igpt_fast.cached import Decoder, KVCache, cache_slots, check_model, prefill, shared_slots
from igpt_fast.config import Config
from igpt_fast.drawing import Options, draw
from igpt_fast.errors import InputError, real, whole
from igpt_fast.model import ImageGPT
from igpt_fast.ops.sampling import check_sampling

CACHE_BYTES = 1 << 30  # the default batch is what this much key-value cache holds,
LARGEST_BATCH = 64  # but no more images than this: beyond it a step's time grows with the batch anyway
MOST = 10**6  # images of one call: more are a slip, and their list alone fills a memory
LAST = 10**15  # the highest number that an image can have, which a stream's 64 bits hold with ease

Progress = Callable[[int, int], None]  # (pixels drawn, pixels to draw in all)
Drawn = Callable[[int, Tensor], None]  # (how many images came before, those just finished: tokens int64 [b, H, W])


def sample(
    model: ImageGPT,
    n: int = 16,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    first: int = 0,
    progress: Progress | None = None,
    drawn: Drawn | None = None,
) -> Tensor:
    """n images from nothing, numbers first to first + n - 1: tokens int64 [n, H, W] on the model's device.

    Image i depends on the model, the options, `seed` and i only: neither on n nor on `batch`, the most images that are
    drawn side by side (None: what fits in 1 GiB of cache, of which a sparse model needs less, at most 64). So `first`
    goes on where another call ended, or gives each of many machines a share. `progress` hears of pixels, and `drawn`
    is given each batch when it is finished, to keep it at once. Raises InputError for options out of range, for a BERT
    model, and for a model whose logits are not finite.
    """
    check_model(model)
    check_options(n=n, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, batch=batch, first=first)
    nothing = torch.empty(1, 0, dtype=torch.int64, device=model.wte.device)
    rows, options = [(0, i, 0) for i in range(first, first + n)], (temperature, top_k, top_p)
    return _generate(model, nothing, rows, seed, batch, options, progress, drawn)


def complete(
    model: ImageGPT,
    tokens: Tensor,
    keep: float = 0.5,
    n: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Progress | None = None,
    drawn: Drawn | None = None,
) -> Tensor:
    """n completions of each image.   tokens [N, H, W] or [N, T] → int64 [N, n, H, W] on the model's device

    The first round(keep · T) pixels in raster order are kept, the rest is drawn; keep = 1 gives the image back n times.
    Completion j of image i depends on the model, the options, `seed`, the kept pixels, i and j only. Otherwise as
    `sample`; to `drawn` completion j of image i is number i · n + j.
    """
    check_model(model)
    check_options(n=n, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, batch=batch, keep=keep)
    known = model.check_tokens(tokens).to(model.wte.device)[:, : kept_pixels(model.config, keep)]
    rows = [(i, i, j) for i in range(len(known)) for j in range(n)]
    images = _generate(model, known, rows, seed, batch, (temperature, top_k, top_p), progress, drawn)
    return images.view(len(known), n, *model.config.size)


def drawing_dtype(device: torch.device) -> torch.dtype:
    """What images are drawn in when nobody says: on a GPU, whose kernels for it are of 16 bits, bfloat16."""
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if bf16 else torch.float32


def kept_pixels(config: Config, keep: float) -> int:
    """How many pixels, in raster order, the fraction `keep` of an image is."""
    return round(keep * config.tokens)


def check_options(
    n: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    keep: float = 0.0,
    first: int = 0,
) -> None:
    """Raise InputError for the first option that is out of range. Needs no model: call it before one is loaded."""
    check_sampling(temperature, top_k, top_p)
    if whole("n", n, 1) > MOST:
        raise InputError(f"n is {n}; ask for at most {MOST:,} images at once, and then for more with another first")
    whole("seed", seed, 0, (1 << 64) - 1)
    whole("first", first, 0, LAST)
    if batch is not None:
        whole("batch", batch, 1)
    real("keep", keep)
    if not 0 <= keep <= 1:  # also catches NaN
        raise InputError(f"keep is {keep}; use a fraction from 0 (keep nothing) to 1 (keep the whole image)")


def _generate(
    model: ImageGPT,
    known: Tensor,
    rows: list[tuple[int, int, int]],
    seed: int,
    batch: int | None,
    options: Options,
    progress: Progress | None,
    drawn: Drawn | None,
) -> Tensor:
    """Images [len(rows), H, W]. A row is (index into known [M, K], image, completion); the last two name its stream.
    Each index has equally many rows, side by side.
    """
    c, count = model.config, known.shape[1]
    out = known.new_empty(len(rows), c.tokens)
    out[:, :count] = known[[row[0] for row in rows]]
    left = c.tokens - count
    if not rows or not left:
        if rows and drawn is not None:
            drawn(0, out.view(-1, *c.size))
        return out.view(-1, *c.size)
    each, prefixes = len(rows) // len(known), {}
    # A caller's autocast would reach prefill's linears but not the decoding ops: all runs in the model's own dtype.
    with torch.inference_mode(), torch.autocast(known.device.type, enabled=False):
        for start, end in _batches(len(known), each, batch or default_batch(model, count, each)):
            part, images = rows[start:end], out[start:end]
            logits, decoder = _start(model, known, [row[0] for row in part], prefixes)
            uniforms = torch.from_numpy(np.stack([_stream(seed, row[1:], c.tokens) for row in part], axis=1))
            for done in draw(decoder, logits, images, uniforms.to(known.device), options):
                if done % c.size[1] == 0 or done == c.tokens:  # once a line, because looking waits for the device
                    _refuse_garbage(images[:, count:done], part, count, c.size[1])
                    if progress is not None:
                        progress(start * left + len(part) * (done - count), len(rows) * left)
            if drawn is not None:
                drawn(start, images.view(-1, *c.size))
    return out.view(-1, *c.size)


def _start(
    model: ImageGPT, known: Tensor, which: list[int], prefixes: dict[int, tuple[Tensor, KVCache]]
) -> tuple[Tensor, Decoder]:
    """Prefills each distinct prompt of known[which] once, at batch size 1, and copies its cache to all its completions.

    Returns the logits of the first pixel to draw, and a Decoder. Rows of one prompt must stand side by side, equally
    many of each; whole tiles of their slots are kept once for all. `prefixes` carries the last prompt over to the next
    batch, which may go on with it.
    """
    c, of, prefix = model.config, list(dict.fromkeys(which)), None
    each, shared = len(which) // len(of), shared_slots(model, known.shape[1])
    if shared:
        shape = (c.layers, len(of), 2, c.heads, shared, c.head_dim)
        prefix = torch.empty(shape, dtype=model.wte.dtype, device=known.device)
    cache = KVCache(c, len(which), model.wte.dtype, known.device, prefix)
    logits = model.wtet.new_empty(len(which), c.colors)
    for at, index in enumerate(of):
        if index not in prefixes:
            prefixes.clear()
            prefixes[index] = prefill(model, known[index : index + 1])
        same = slice(at * each, (at + 1) * each)
        logits[same], source = prefixes[index]
        if prefix is not None:
            prefix[:, at] = source.data[:, 0, ..., :shared, :]
        cache.fill(same, source)
    return logits, Decoder(model, cache)


def _batches(count: int, each: int, size: int) -> Iterator[tuple[int, int]]:
    """First row and end of each batch, of at most `size` rows: of whole ones of `count` images that have `each`, or of
    one of them.
    """
    if each <= size:
        step = size // each * each
        yield from ((at, min(at + step, count * each)) for at in range(0, count * each, step))
        return
    for first in range(0, count * each, each):
        yield from ((at, min(at + size, first + each)) for at in range(first, first + each, size))


def default_batch(model: ImageGPT, known: int = 0, each: int = 1) -> int:
    """How many images, `each` of them with `known` pixels in common, are drawn side by side when nobody says."""
    c = model.config
    shared = shared_slots(model, known)
    slots = cache_slots(c) - shared + -(-shared // each)
    return max(1, min(LARGEST_BATCH, CACHE_BYTES // (2 * c.layers * slots * c.width * model.wte.element_size())))


def _stream(seed: int, stream: tuple[int, int], count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the uniforms of one image's pixels, fixed by the seed and the stream's two numbers."""
    key = np.array([seed, stream[0]], dtype=np.uint64)
    # Philox counts in the lowest word, so streams that start 2**128 apart never meet.
    counter = np.array([0, 0, stream[1], 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)


def _refuse_garbage(drawn: Tensor, rows: list[tuple[int, int, int]], first: int, width: int) -> None:
    """InputError when a token is -1, which is how sample_tokens says that the logits were not finite.

    drawn [N, K]: the tokens of the N rows and of the pixels first.., of a grid `width` pixels wide
    """
    if not (drawn < 0).any():
        return
    at, image = (drawn < 0).t().nonzero()[0].tolist()
    row, column = divmod(first + at, width)
    raise InputError(
        f"the logits of pixel ({row}, {column}) of image {rows[image][1]} are not finite; the weights are broken "
        "(did training diverge?) or overflow in this dtype: use another checkpoint or float32"
    )
