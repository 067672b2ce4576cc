"""The patterns of a model's layers and heads: one form for each meaning, and their masks, compiled once a process.

A model's pattern is None (dense attention), a text for all layers, or a sequence that is cycled over the layers, whose
elements are None, a text, or a sequence that is cycled over the heads. "dense" is another word for None.
"""

import typing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from igpt_fast.errors import InputError
from igpt_fast.patterns.block_mask import BlockMask, compiled
from igpt_fast.patterns.parse import parse
from igpt_fast.patterns.predicates import Pattern

Heads = str | None | tuple[str | None, ...]  # one layer: all heads alike, or cycled over them
Layers = Heads | tuple[Heads, ...]  # a model: all layers alike, or cycled over them; only None and str stand alone

_FORMS = "give a text such as 'row|neighborhood(7)', or a list of them, cycled over the layers"


def normalised(pattern: object, layers: int, heads: int) -> Layers:
    """The one form of all that say the same of every head of every layer: hashable, and JSON once tuples are lists.

    A text becomes that of its Pattern; cycles become as short as they can be. Raises InputError for what is no pattern,
    and for a list that is longer than there are layers, or heads, to take it.
    """
    if not isinstance(pattern, (list, tuple)):
        return _text(pattern)
    cycle = _cycle([_heads(element, heads) for element in pattern], layers, "layers")
    return cycle[0] if len(cycle) == 1 and not isinstance(cycle[0], tuple) else cycle


def of_layer(pattern: Layers, layer: int) -> tuple[str | None, ...]:
    """The texts that are cycled over the heads of one layer, from a normalised pattern; None: dense."""
    element = pattern[layer % len(pattern)] if isinstance(pattern, tuple) else pattern
    return element if isinstance(element, tuple) else (element,)


def described(pattern: Layers) -> str:
    """A normalised pattern for a person: layers apart by commas, heads by slashes."""
    if not isinstance(pattern, tuple):
        return pattern or "dense"
    return ", ".join(" / ".join(map(described, e)) if isinstance(e, tuple) else described(e) for e in pattern)


def masks_of(
    texts: Sequence[str | None], size: tuple[int, int], causal: bool, slots: int, device: torch.device
) -> tuple[BlockMask | None, ...]:
    """The masks that are cycled over the heads, on `device`, for the first `slots` slots of a grid of `size`."""
    found = {text: None if text is None else _mask(text, size, causal, slots, device) for text in dict.fromkeys(texts)}
    return tuple(found[text] for text in texts)


def _mask(text: str, size: tuple[int, int], causal: bool, slots: int, device: torch.device) -> BlockMask:
    if torch.compiler.is_compiling():  # what compiles a pattern cannot be traced, and need not be: one op finds it
        tables = torch.ops.igpt.pattern_tables(text, size[0], size[1], causal, slots, device)
        return BlockMask(slots, causal, tuple(tables), None)
    return _kept(text, size, causal, slots, device)


# By what they say, so that all layers, models and copies of models share them, and no state dict or pickle holds them.
@lru_cache(maxsize=256)
def _kept(text: str, size: tuple[int, int], causal: bool, slots: int, device: torch.device) -> BlockMask:
    # In a thread of its own, whoever asks first: what is made under inference mode could not be saved for a backward
    # pass, and under torch.func, fake tensors or another default device tensors have no values to compile from.
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(_made, text, size, causal, slots, device).result()


def _made(text: str, size: tuple[int, int], causal: bool, slots: int, device: torch.device) -> BlockMask:
    if slots < size[0] * size[1]:
        return _kept(text, size, causal, size[0] * size[1], torch.device("cpu")).first(slots).to(device)
    return compiled(text, size, causal).to(device)


@torch.library.custom_op("igpt::pattern_tables", mutates_args=())
def _pattern_tables(
    text: str, height: int, width: int, causal: bool, slots: int, device: torch.device
) -> typing.List[torch.Tensor]:  # noqa: UP006 - torch 2.4 knows no other name for it
    # Copies: whoever compiles a graph may use the room of an op's results for something else.
    return [t.clone() for t in _kept(text, (height, width), causal, slots, device).tensors]


@_pattern_tables.register_fake
def _(text, height, width, causal, slots, device):
    known = _kept(text, (height, width), causal, slots, torch.device("cpu")).tensors
    return [torch.empty(t.shape, dtype=t.dtype, device=device) for t in known]


def _heads(element: object, heads: int) -> Heads:
    if not isinstance(element, (list, tuple)):
        return _text(element)
    cycle = _cycle([_text(text) for text in element], heads, "heads")
    return cycle[0] if len(cycle) == 1 else cycle


def _text(pattern: object) -> str | None:
    if isinstance(pattern, Pattern):
        if not pattern.cut:
            raise InputError(
                f"pattern {pattern.text} is a predicate of your own, which a saved model cannot name; give it a name "
                "in igpt_fast/patterns/predicates.py"
            )
        return pattern.text
    if pattern is None or (isinstance(pattern, str) and pattern.strip() == "dense"):
        return None
    if not isinstance(pattern, str):
        raise InputError(f"pattern is {pattern!r}; {_FORMS}, whose elements may be lists, cycled over the heads")
    return parse(pattern).text


def _cycle(elements: list, count: int, what: str) -> tuple:
    """The shortest cycle that gives each of the `count` layers, or heads, what cycling `elements` gives it."""
    if not 1 <= len(elements) <= count:
        raise InputError(
            f"pattern lists {len(elements)} for {count} {what}; list 1 to {count}, which are then cycled over them"
        )
    every = [elements[i % len(elements)] for i in range(count)]
    short = next(n for n in range(1, count + 1) if all(every[i] == every[i % n] for i in range(count)))
    return tuple(every[:short])
