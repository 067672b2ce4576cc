"""A pattern as a picture: what one pixel sees, and the whole mask with the tiles that it touches."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from igpt_fast.patterns.block_mask import TILE, BlockMask

PANEL, GAP, TEXT = 512, 24, 28  # pixels: a panel's side, the white around it, the line above it
PAPER, TOUCHED, SEEN, OWN = (255, 255, 255), (206, 222, 240), (31, 78, 140), (214, 69, 46)


def draw(mask: BlockMask, size: tuple[int, int], title: str) -> Image.Image:
    """Two panels. Left, the grid: one pixel (red) and what it sees (blue). Right, queries down and keys across."""
    image = Image.new("RGB", (2 * PANEL + 3 * GAP, PANEL + 2 * GAP + TEXT), PAPER)
    pen = ImageDraw.Draw(image)
    row, col = size[0] * 5 // 8, size[1] // 2
    panels = [_grid(mask, size, row * size[1] + col), _matrix(mask)]
    texts = [f"{title}: what pixel ({row}, {col}) of {size[0]} x {size[1]} sees", _caption(mask)]
    for at, (panel, text) in enumerate(zip(panels, texts, strict=True)):
        left = GAP + at * (PANEL + GAP)
        pen.text((left, GAP), text, fill=(0, 0, 0))
        scaled = panel.resize((PANEL, PANEL), Image.Resampling.NEAREST if at == 0 else Image.Resampling.BOX)
        image.paste(scaled, (left, GAP + TEXT))
        pen.rectangle((left - 1, GAP + TEXT - 1, left + PANEL, GAP + TEXT + PANEL), outline=(120, 120, 120))
    return image


def _caption(mask: BlockMask) -> str:
    tiles = f"{mask.raster.density():.1%} of the tiles"
    taken = "" if mask.order == "raster" else f" ({mask.order}: {mask.density():.1%})"
    return f"the mask, and its tiles: {mask.pair_density():.1%} of the pairs in {tiles}{taken}"


def _grid(mask: BlockMask, size: tuple[int, int], pixel: int) -> Image.Image:
    seen = mask.seen(torch.tensor([pixel]), mask.tokens)[0]
    if mask.causal:  # slot j holds pixel j - 1
        seen = torch.cat([seen[1:], seen.new_zeros(1)])
    colors = _colors(seen, torch.zeros_like(seen))
    colors[pixel] = torch.tensor(OWN, dtype=torch.uint8)
    return Image.fromarray(colors.view(*size, 3).numpy())


def _matrix(mask: BlockMask) -> Image.Image:
    """At most 1024 × 1024: each cell of a larger mask is coloured when any pair in it is seen."""
    n = mask.tokens
    cell = (n + 1023) // 1024
    cells = (n + cell - 1) // cell
    seen = torch.zeros(cells, cells, dtype=torch.bool)
    for at in range(cells):
        rows = mask.seen(torch.arange(at * cell, min(n, (at + 1) * cell)), n).any(0)
        seen[at] = torch.nn.functional.pad(rows, (0, cells * cell - n)).view(cells, cell).any(1)
    (part,) = mask.raster.parts
    row_start, row_tile = part.row_start.cpu().long(), part.row_tile.cpu().long()
    tiles = torch.zeros(len(row_start) - 1, len(row_start) - 1, dtype=torch.bool)
    tiles[torch.repeat_interleave(torch.arange(len(tiles)), row_start.diff()), row_tile] = True
    tile_of = torch.arange(cells) * cell // TILE
    return Image.fromarray(_colors(seen, tiles[tile_of][:, tile_of]).numpy())


def _colors(seen: Tensor, touched: Tensor) -> Tensor:
    """uint8 [..., 3]: seen before touched before neither."""
    palette = torch.tensor([PAPER, TOUCHED, SEEN], dtype=torch.uint8)
    return palette[torch.where(seen, 2, touched.long())]
