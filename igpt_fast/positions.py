"""Position embeddings as tables on the pixel grid: the sum of axial ones, and what becomes of them at another size.

Row j of wpe is added to slot j. In the shifted autoregressive sequence slot j holds pixel j - 1 and predicts pixel j;
in BERT's it holds pixel j and predicts it. In both, row j belongs to the place of pixel j: the tables have no shift.
"""

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast.errors import InputError

log = logging.getLogger("igpt_fast")


def summed(rows: Tensor, columns: Tensor) -> Tensor:
    """wpe [H·W, d] of axial tables [H, d] and [W, d]."""
    return (rows.unsqueeze(1) + columns.unsqueeze(0)).flatten(0, 1)


def resized(tensors: Mapping[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
    """A model's tensors, by our names, for images of another size (height, width); all but positions as they are.

    Source: the position embeddings of vision transformers that are fine-tuned at another resolution (Dosovitskiy et
    al., 2020, section 3.2). Each channel of wpe is an image on the grid of pixels, and is resampled as one: bicubic
    with pixel centres aligned (torch's interpolate, align_corners=False; no smoothing where the grid shrinks). Axial
    tables are resampled each along its own axis, likewise. Computed in float32 or wider, returned in the dtype given.
    A line in the log says so. Raises InputError for a size that memory cannot hold.
    """
    found = dict(tensors)
    if "wpe" in found:
        found["wpe"] = _resampled(found["wpe"].unflatten(0, old), new).flatten(0, 1)
    else:
        found["wpe_row"] = _resampled(found["wpe_row"].unsqueeze(1), (new[0], 1)).squeeze(1)
        found["wpe_col"] = _resampled(found["wpe_col"].unsqueeze(1), (new[1], 1)).squeeze(1)
    log.warning("position embeddings resampled from %s to %s pixels", *(f"{h}x{w}" for h, w in (old, new)))
    return found


def _resampled(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W, d] → [*size, d]"""
    wide = grid.detach().to(torch.promote_types(grid.dtype, torch.float32)).permute(2, 0, 1).unsqueeze(0)
    try:
        found = F.interpolate(wide, size=size, mode="bicubic", align_corners=False)
    except RuntimeError as error:  # torch's word for memory, and for a size that it cannot count
        text = f"position embeddings of {size[0]}x{size[1]} pixels and {wide.shape[1]} channels do not fit into memory"
        raise InputError(f"{text}; ask for a smaller size") from error
    return found.squeeze(0).permute(1, 2, 0).to(grid.dtype).contiguous()
