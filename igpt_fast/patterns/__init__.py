"""Sparse attention patterns: predicates on two pixels by name, compiled into tiles that the kernels walk over."""

from igpt_fast.patterns.block_mask import BlockMask, compiled
from igpt_fast.patterns.layers import described, masks_of, normalised, of_layer
from igpt_fast.patterns.pages import Pages, pages_of
from igpt_fast.patterns.parse import parse
from igpt_fast.patterns.predicates import (
    PATTERNS,
    Pattern,
    Pixels,
    Predicate,
    axial,
    blocks,
    column,
    dilated,
    fixed,
    global_tokens,
    local,
    neighborhood,
    random_blocks,
    row,
    strided,
)
from igpt_fast.patterns.tables import FIELDS, TILE, Rows, parts_of, unpack

__all__ = [
    "FIELDS",
    "PATTERNS",
    "TILE",
    "BlockMask",
    "Pages",
    "Pattern",
    "Pixels",
    "Predicate",
    "Rows",
    "axial",
    "blocks",
    "column",
    "compiled",
    "described",
    "dilated",
    "fixed",
    "global_tokens",
    "local",
    "masks_of",
    "neighborhood",
    "normalised",
    "of_layer",
    "pages_of",
    "parse",
    "parts_of",
    "random_blocks",
    "row",
    "strided",
    "unpack",
]
