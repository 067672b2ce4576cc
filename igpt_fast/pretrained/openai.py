"""The checkpoints of the original code, which TensorFlow wrote, under our names.

    model/wte, wtet [V, d], wpe [n, d], sos [d]        wte, wtet, wpe, sos; no sos: it is a BERT model
    model/h{l}/ln_1/g, ln_2/g, model/ln_f/g [d]        blocks.{l}.ln_1, .ln_2, ln_f
    model/h{l}/attn/{q,k,v}_proj [H, e, d]             blocks.{l}.attn.qkv.weight, one above the other: rows are outputs
    model/h{l}/attn/c_proj [H, e, d]                   blocks.{l}.attn.proj.weight, transposed: rows were inputs
    model/h{l}/mlp/c_fc/w [d, 4d], c_proj/w [4d, d]    blocks.{l}.mlp.fc.weight, .proj.weight, transposed likewise
    model/clf/wclf [classes, d]                        wclf

Slots of optimizers and counters of steps are skipped. A shape may have lost or gained what a reshape mends in one way
only: axes of length 1 in front, and [H, e, d] as [d, d]. All else is refused by name.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from igpt_fast.config import PRESETS, Config
from igpt_fast.errors import InputError
from igpt_fast.pretrained.bundle import Bundle
from igpt_fast.pretrained.settings import grid_of

_SKIPPED = re.compile(
    r"(.*/)?(adam_[vm]|Adam(_\d+)?|AdamWeightDecayOptimizer(_\d+)?|global_step|\w*_step|beta\d_power)(/.*)?"
)


def read_openai(
    prefix: Path, heads: int | None = None, size: tuple[int, int] | None = None
) -> tuple[Config, dict[str, Tensor]]:
    """The Config and our tensors of the checkpoint PREFIX.index, PREFIX.data-…, float32 as they are stored.

    heads: only for files whose projections are [d, d] and whose shape is none of the published ones. size: (height,
    width), when the positions are not a square. Raises InputError that names the file and the variable.
    """
    bundle = Bundle(prefix)
    names = {name.removeprefix("model/"): name for name in bundle.entries if not _SKIPPED.fullmatch(name)}
    config = _infer_config(bundle, names, heads, size)
    left, ours = set(names), {}
    for ours_name, (theirs, shape) in _layout(config):
        parts = []
        for name in theirs:
            if name not in names:
                raise InputError(f"{bundle.path} has no model/{name}")
            left.discard(name)
            parts.append(_reshaped(bundle, names[name], shape, config.width))
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        ours[ours_name] = tensor.t() if ours_name.endswith(("proj.weight", "fc.weight")) else tensor
    if left:
        first = ", ".join(sorted(names[name] for name in left)[:5])
        raise InputError(f"{bundle.path} holds {first}, which an Image GPT of {config.layers} layers has not")
    return config, ours


def _layout(c: Config) -> Iterator[tuple[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """Our name → the variables that it is made of, and the shape of each."""
    d, heads = c.width, (c.heads, c.head_dim, c.width)
    yield "wte", (("wte",), (c.colors, d))
    yield "wpe", (("wpe",), (c.tokens, d))
    yield "wtet", (("wtet",), (c.colors, d))
    yield "ln_f", (("ln_f/g",), (d,))
    if c.objective == "ar":
        yield "sos", (("sos",), (d,))
    if c.classes:
        yield "wclf", (("clf/wclf",), (c.classes, d))
    for layer in range(c.layers):
        here, there = f"blocks.{layer}.", f"h{layer}/"
        yield f"{here}ln_1", ((f"{there}ln_1/g",), (d,))
        yield f"{here}ln_2", ((f"{there}ln_2/g",), (d,))
        yield f"{here}attn.qkv.weight", (tuple(f"{there}attn/{part}_proj" for part in "qkv"), heads)
        yield f"{here}attn.proj.weight", ((f"{there}attn/c_proj",), heads)
        yield f"{here}mlp.fc.weight", ((f"{there}mlp/c_fc/w",), (d, c.mlp_width))
        yield f"{here}mlp.proj.weight", ((f"{there}mlp/c_proj/w",), (c.mlp_width, d))


def _reshaped(bundle: Bundle, name: str, shape: tuple[int, ...], width: int) -> Tensor:
    """The variable as a matrix or vector: [H, e, d] becomes [d, d]. InputError when its shape could mean two things."""
    stored, wanted = bundle.entries[name].shape, shape
    good = _fits(stored, shape)
    if len(shape) == 3:
        wanted = (width, width)
        # As a convolution's kernel, [1, d, d], it has inputs as rows: for q, k and v the other way round.
        good = good or (_fits(stored, wanted) and (stored == wanted or name.endswith("c_proj")))
    if not good:
        raise InputError(f"{bundle.path}: {name} is {list(stored)}, which is not {list(shape)} in one way only")
    return bundle.read(name).reshape(wanted)


def _fits(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether `stored` is `shape`, but for axes of length 1 in front."""
    extra = len(stored) - len(shape)
    return extra >= 0 and stored == (1,) * extra + shape


def _infer_config(bundle: Bundle, names: dict[str, str], heads: int | None, size: tuple[int, int] | None) -> Config:
    """The Config that the shapes tell."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in names:
            raise InputError(f"{bundle.path} has no model/{name}; it is not an Image GPT's checkpoint")
        stored = bundle.entries[names[name]].shape
        if not _fits(stored, stored[-axes:]) or len(stored) < axes:
            raise InputError(f"{bundle.path}: {names[name]} is {list(stored)}; it has {axes} axes")
        return stored[-axes:]

    (colors, width), (positions, _) = shape("wte", 2), shape("wpe", 2)
    blocks = [int(match[1]) for name in names if (match := re.match(r"h(\d{1,6})/", name))]
    layers = 1 + max(blocks, default=-1)
    projection = bundle.entries[names["h0/attn/q_proj"]].shape if "h0/attn/q_proj" in names else ()
    found = projection[-3] if len(projection) >= 3 and projection[-3] > 1 else None
    published = next((p["heads"] for p in PRESETS.values() if (p["layers"], p["width"]) == (layers, width)), None)
    if found and heads and found != heads:
        raise InputError(f"{bundle.path}: its projections have {found} heads, not {heads}; leave the number out")
    heads = found or heads or published
    if heads is None:
        raise InputError(f"{bundle.path}: the shape of the projections does not tell the number of heads; give it")
    return Config(
        layers=layers,
        width=width,
        heads=heads,
        colors=colors,
        size=grid_of(positions, None, str(bundle.path), size),
        objective="ar" if "sos" in names else "bert",
        classes=shape("clf/wclf", 2)[0] if "clf/wclf" in names else 0,
        mlp_width=shape("h0/mlp/c_fc/w", 2)[1],
    )
