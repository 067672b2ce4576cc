"""The forward pass with a memory: prefill runs all known pixels at once, decode_one_token adds one pixel at a time."""

from functools import lru_cache, partial

import torch
from torch import Tensor

from igpt_fast import ops
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.modules import refuse_changed
from igpt_fast.ops.decode_step import LayerWeights, StepMasks, StepWeights, reads_prefixes
from igpt_fast.patterns import TILE, Pages, masks_of, pages_of

Places = Tensor | slice  # of the slots of a sequence, or of a cache


class KVCache:
    """Keys and values of the first `length` slots, without those that no later slot attends to.

    data: [layers, batch, 2, heads, slots, head_dim], k before v. pages: int32 [tiles], by which slot t is at
    pages[t // 64] * 64 + t % 64 of few slots, which pages take turns in; None where each of T slots has its own.
    prefix: [layers, M, 2, heads, P, head_dim], the first slots of each batch / M neighbours, which `data` then lacks;
    None where each image has all of its own.
    """

    def __init__(
        self, config: Config, batch: int, dtype: torch.dtype, device: torch.device, prefix: Tensor | None = None
    ) -> None:
        self._table, self.prefix = _table_of(config), prefix
        slots = cache_slots(config) - self.shared
        self.data = torch.empty(
            (config.layers, batch, 2, config.heads, slots, config.head_dim), dtype=dtype, device=device
        )
        self.pages = self._table and self._table.of.to(device)
        self.length = 0

    @property
    def shared(self) -> int:
        """How many slots are in `prefix`."""
        return 0 if self.prefix is None else self.prefix.shape[4]

    def store(self, layer: int, held: tuple[Places, Places], kv: Tensor) -> None:
        """Writes k and v [batch, 2, heads, K, head_dim] of the slots 0..K-1 into a layer's cache; held: `held(K)`."""
        slots, places = held
        self.data[layer][..., places, :] = kv[..., slots, :]

    def fill(self, rows: slice, source: "KVCache") -> None:
        """Give every image of `rows` the known slots of the one image in `source`, but for those in `prefix`."""
        self.length = source.length
        slots, places = self.held(self.length)
        self.data[:, rows, ..., places, :] = source.data[..., slots if self._table is None else places, :]

    def held(self, length: int) -> tuple[Places, Places]:
        """Of the first `length` slots those that are kept in `data`, and where."""
        if self._table is None:
            return slice(self.shared, length), slice(length - self.shared)
        slots, places = (t.to(self.data.device) for t in self._table.held(length))
        return slots, places


def shared_slots(model: ImageGPT, known: int) -> int:
    """How many slots images that have the first `known` pixels in common keep once for all of them: whole tiles, where
    kernels read them there and pages do not take turns.
    """
    c = model.config
    if not known or _table_of(c) is not None or not reads_prefixes(model.wte, c.head_dim):
        return 0
    return (known + 1) // TILE * TILE


def cache_slots(config: Config) -> int:
    """How many slots of keys and values of one image are kept at a time: fewer than T where patterns allow it."""
    table = _table_of(config)
    return config.tokens if table is None else table.count * TILE


def _table_of(config: Config) -> Pages | None:
    texts = tuple(dict.fromkeys(text for layer in range(config.layers) for text in config.patterns(layer)))
    return _table(texts, config.size)


@lru_cache(maxsize=64)
def _table(texts: tuple[str | None, ...], size: tuple[int, int]) -> Pages | None:
    if None in texts:
        return None
    return pages_of(masks_of(texts, size, True, size[0] * size[1], torch.device("cpu")))


@torch.inference_mode()
def prefill(model: ImageGPT, pixels: Tensor) -> tuple[Tensor, KVCache]:
    """Run K < T known pixels at once.   pixels int64 [N, K] → logits [N, colors] of pixel K, and the cache

    Raises InputError when there is no pixel left to predict, and for a BERT model.
    """
    check_model(model)
    slots = pixels.shape[1] + 1
    if slots > model.config.tokens:
        raise InputError(f"{slots - 1} pixels are known of {model.config.tokens}: there is none left to predict")
    cache = KVCache(model.config, len(pixels), model.wte.dtype, model.wte.device)
    h, delta, held = model.embed(pixels), None, cache.held(slots)
    for layer, block in enumerate(model.blocks):
        h, delta = block(h, delta, partial(cache.store, layer, held))
    x, _ = ops.rms_norm(delta[:, -1], model.ln_f, model.config.eps, residual=h[:, -1])
    cache.length = slots
    return ops.linear(x, model.wtet), cache


class Decoder:
    """A model and a cache, ready to step: the model's own weights as plain tensors, looked up once; no copies are made,
    but of axial positions the sum.

    Raises InputError for a BERT model, and for one whose modules were replaced or have hooks.
    """

    def __init__(self, model: ImageGPT, cache: KVCache) -> None:
        check_model(model)
        self.config, self.cache = model.config, cache
        own = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}

        def linear(name: str) -> tuple[Tensor, Tensor | None]:
            return own[f"{name}.weight"], own.get(f"{name}.bias")

        layers = []
        for index in range(model.config.layers):
            at = f"blocks.{index}."
            attention = own[f"{at}ln_1"], *linear(f"{at}attn.qkv"), *linear(f"{at}attn.proj")
            mlp = own[f"{at}ln_2"], *linear(f"{at}mlp.fc"), *linear(f"{at}mlp.proj")
            layers.append(LayerWeights(*attention, *mlp))
        c, where = model.config, cache.data.device
        every = [masks_of(c.patterns(layer), c.size, True, c.tokens, where) for layer in range(c.layers)]
        self.masks = () if c.pattern is None else StepMasks(every)
        self.weights = StepWeights(own["wte"], model.position_table().detach(), layers, own["ln_f"], own["wtet"])

    def step(self, pixel: Tensor, slot: int | Tensor) -> Tensor:
        """The newest pixel into `slot`, as ops.decode_step takes it → logits [batch, colors] of the next one."""
        c = self.cache
        return ops.decode_step(c.data, pixel, self.weights, slot, self.config.eps, self.masks, c.pages, c.prefix)


@torch.inference_mode()
def decode_one_token(decoder: Decoder, pixel: Tensor) -> Tensor:
    """Put the newest pixel into the cache's next slot.   pixel int64 [batch] → logits [batch, colors] of the next pixel

    Raises InputError when the cache is full.
    """
    cache, slot = decoder.cache, decoder.cache.length
    if slot >= decoder.config.tokens:
        raise InputError(f"the cache already holds all {slot} slots of an image")
    logits = decoder.step(pixel, slot)
    cache.length = slot + 1
    return logits


def check_model(model: ImageGPT) -> None:
    """InputError for a model that defines no order to draw pixels in, or of which steps would leave something out."""
    if not isinstance(model, ImageGPT):
        inside = [name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), ImageGPT)]
        way = f"its .{inside[0]} is one" if inside else "a model of transformers draws by its own generate"
        raise InputError(f"the model is a {type(model).__name__}; give an igpt_fast.ImageGPT ({way})")
    if model.config.objective != "ar":
        raise InputError(
            f"an objective={model.config.objective!r} model cannot be sampled from; train one with objective='ar'"
        )
    refuse_changed(model)
