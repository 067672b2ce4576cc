"""The same weights under Hugging Face's names and under ours, all accounted for.

    ours                                theirs
    wte [V, d], sos [d]                 transformer.wte.weight [V + 1, d]; the last row is sos, which BERT has not
    wpe, ln_f, wtet                     transformer.wpe.weight, transformer.ln_f.weight, lm_head.weight
    blocks.{l}.ln_1, .ln_2              transformer.h.{l}.ln_1.weight, .ln_2.weight
    blocks.{l}.attn.qkv, .proj          transformer.h.{l}.attn.c_attn, .c_proj; weights are [in, out], ours [out, in]
    blocks.{l}.mlp.fc, .proj            transformer.h.{l}.mlp.c_fc, .c_proj; likewise
    wclf                                score.weight

Theirs always has biases; a file may leave out all of them, but not some. Ours has them (config.bias) only when one of
theirs is not zero.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.positions import summed

WTE, WPE, HEAD, SCORE, FC = (
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "lm_head.weight",
    "score.weight",
    "transformer.h.0.mlp.c_fc.weight",
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A causal mask and a constant that old files hold as buffers: not weights.
_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")


class Theirs:
    """A state dict in Hugging Face's names, made full, without the mask buffers; and the words for where each lies."""

    def __init__(self, tensors: Mapping[str, Tensor], where: Mapping[str, str] | None = None) -> None:
        """where: of each key of `tensors` the file that holds it; None: it is a state dict in memory."""
        self.tensors: dict[str, Tensor] = {}
        self._where: dict[str, str] = {}
        for key, tensor in tensors.items():
            if _BUFFER.fullmatch(key):
                continue
            name = key if key.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{key}"
            self._where[name] = where[key] if where else "the state dict"
            if name in self.tensors:
                raise InputError(f"{self._where[name]} holds {name} twice, with the prefix `transformer.` and without")
            if tensor.dtype not in FLOATS or tensor.is_meta:
                what = "without its numbers" if tensor.is_meta else f"as {tensor.dtype}"
                raise InputError(f"{self._where[name]} holds {key} {what}; weights are {', '.join(map(str, FLOATS))}")
            self.tensors[name] = tensor

    def where(self, name: str | None = None) -> str:
        """Where `name` lies, or, when it does not, all that is there."""
        files = list(dict.fromkeys(self._where.values()))
        return self._where.get(name or "", ", ".join(files[:3]) + (" …" if files[3:] else ""))

    def layers(self) -> int:
        """One more than the highest block there is."""
        found = (re.match(r"transformer\.h\.(\d{1,6})\.", name) for name in self.tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of `name`. Raises InputError when it is missing or has another number of axes."""
        if name not in self.tensors:
            raise InputError(f"{self.where()} has no {name}; it is not an ImageGPT's, or only a part of one")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes:
            raise InputError(f"{self.where(name)} holds {name} as {list(shape)}; it has {axes} axes")
        return shape

    def headless(self) -> bool:
        """No output table: a classifier (or a bare model), which never had one."""
        return HEAD not in self.tensors


def to_ours(theirs: Theirs, config: Config, headless: bool = False) -> tuple[Config, dict[str, Tensor]]:
    """Their tensors under our names and in our layouts, in the widest dtype among them; and config with its bias set.

    headless: the output table may be missing; it is then zero, as a fresh model's. Raises InputError that names the
    file and key of whatever is missing, left over or of another shape.
    """
    tensors = theirs.tensors
    biases = [tensor for name, tensor in tensors.items() if name.endswith(".bias")]
    bias = any(bool(tensor.any()) for tensor in biases)
    config = replace(config, bias=bias)
    wanted = {}
    for name, (shape, our_name) in _shapes(config):  # no further than the file goes, whatever config says
        if name not in tensors and (biases or not name.endswith(".bias")) and not (headless and name == HEAD):
            raise InputError(f"{theirs.where()} has no {name}")
        if name in tensors and tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise InputError(f"{theirs.where(name)} holds {name} as {found}, not {list(shape)}: shapes do not fit")
        wanted[name] = shape, our_name
    if left := sorted(tensors.keys() - wanted.keys()):
        few = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if left[5:] else "")
        raise InputError(f"{theirs.where(left[0])} holds {few}, which an ImageGPT of {config.layers} layers has not")
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    ours = {}
    for name, (shape, our_name) in wanted.items():
        if name.endswith(".bias") and not bias:
            continue
        tensor = tensors[name] if name in tensors else torch.zeros(shape)
        ours[our_name] = (tensor.t() if _turned(name) else tensor).to(dtype)
    if config.objective == "ar":
        ours["wte"], ours["sos"] = ours["wte"][:-1], ours["wte"][-1]
    return config, ours


def to_theirs(ours: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our tensors under their names and in their layouts, contiguous copies.

    Biases that ours lacks are zero; of axial positions it is their sums.
    """
    theirs = {}
    for name, (shape, our_name) in _shapes(config):
        tensor = ours.get(our_name)
        if tensor is None and name == WPE:
            tensor = summed(ours["wpe_row"], ours["wpe_col"])
        elif tensor is None:
            tensor = ours["wte"].new_zeros(shape)
        elif name == WTE and config.objective == "ar":
            tensor = torch.cat((tensor, ours["sos"][None]))
        tensor = tensor.t() if _turned(name) else tensor
        theirs[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return theirs


def infer_config(theirs: Theirs, **known: Any) -> Config:
    """The Config that the shapes tell; `known` has what they do not: size (height, width), heads, eps, objective."""
    rows, width = theirs.shape(WTE, 2)
    return Config(
        layers=theirs.layers(),
        width=width,
        colors=rows - (known.get("objective", "ar") == "ar"),
        classes=theirs.shape(SCORE, 2)[0] if SCORE in theirs.tensors else 0,
        mlp_width=theirs.shape(FC, 2)[1],
        **known,
    )


def _shapes(c: Config) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Every name of theirs with its shape there and our name for it."""
    d = c.width
    yield WTE, ((c.colors + (c.objective == "ar"), d), "wte")
    yield WPE, ((c.tokens, d), "wpe")
    for layer in range(c.layers):
        there, here = f"transformer.h.{layer}.", f"blocks.{layer}."
        yield f"{there}ln_1.weight", ((d,), f"{here}ln_1")
        yield f"{there}ln_2.weight", ((d,), f"{here}ln_2")
        for hf, name, fan_in, fan_out in (
            ("attn.c_attn", "attn.qkv", d, 3 * d),
            ("attn.c_proj", "attn.proj", d, d),
            ("mlp.c_fc", "mlp.fc", d, c.mlp_width),
            ("mlp.c_proj", "mlp.proj", c.mlp_width, d),
        ):
            yield f"{there}{hf}.weight", ((fan_in, fan_out), f"{here}{name}.weight")
            yield f"{there}{hf}.bias", ((fan_out,), f"{here}{name}.bias")
    yield "transformer.ln_f.weight", ((d,), "ln_f")
    yield HEAD, ((c.colors, d), "wtet")
    if c.classes:
        yield SCORE, ((c.classes, d), "wclf")


def _turned(name: str) -> bool:
    """True for the matrices that theirs keeps as [in, out]."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
