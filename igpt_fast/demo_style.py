"""The look of the demo's page, light and dark, narrow and wide, and its building blocks: all of it our own."""

import base64

import numpy as np

from igpt_fast.pictures import to_png_bytes

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1c1a; --soft: #67635b; --rule: #dcd8cf; --tile: #f1eee7;
  --link: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --paper: #16171a; --ink: #e9e7e2; --soft: #a09c93; --rule: #34363b;
  --tile: #202227; --link: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.6;
  font: 1.0625rem/1.6 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif; }
main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1, h2, th, .kicker, .tiles, figcaption, dt, .note { font-family: system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(2rem, 7vw, 3.1rem); line-height: 1.08; letter-spacing: -.02em; margin: 0 0 1.25rem; }
h2 { font-size: 1.35rem; line-height: 1.25; letter-spacing: -.01em; margin: 0 0 .75rem; }
section { border-top: 1px solid var(--rule); margin-top: 2.75rem; padding-top: 1.75rem; }
p { margin: 0 0 1rem; }
a { color: var(--link); }
.kicker { color: var(--soft); font-size: .8rem; letter-spacing: .09em; text-transform: uppercase;
  margin-bottom: .4rem; }
.lead { font-size: 1.2rem; line-height: 1.5; }
.note { color: var(--soft); font-size: .875rem; line-height: 1.5; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0;
  padding: 0; list-style: none; }
.tiles li { background: var(--tile); border-radius: .5rem; padding: .85rem 1rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.2; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .8rem; line-height: 1.4; display: block; margin-top: .25rem; }
.pixels { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 2px;
  box-shadow: 0 0 0 1px var(--rule); }
.strip, .eight { display: grid; grid-template-columns: repeat(8, 1fr); gap: .35rem; }
.strip { margin-bottom: 1.5rem; gap: .5rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.5rem; margin-bottom: 1rem; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .5rem; }
.figure { display: block; width: 100%; height: auto; margin: 1.25rem 0; mix-blend-mode: multiply; }
table { border-collapse: collapse; width: 100%; margin: 0 0 1rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-size: .8rem; font-weight: 500; text-align: left; padding: .3rem .75rem .3rem 0; }
td { border-top: 1px solid var(--rule); padding: .3rem .75rem .3rem 0; }
.best td { font-weight: 700; }
.grid { table-layout: fixed; }
.grid th { white-space: nowrap; }
.grid td { border: 0; padding: .2rem; }
.grid .gap { width: .8rem; }
.interval { color: var(--soft); font-size: .85rem; white-space: nowrap; margin-left: .35rem; }
.half { display: block; aspect-ratio: 1; border-radius: 2px; box-shadow: 0 0 0 1px var(--rule);
  background: repeating-linear-gradient(45deg, var(--tile) 0 4px, transparent 4px 8px); }
.half .pixels { box-shadow: none; border-radius: 2px 2px 0 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 0; font-size: .95rem; }
dt { color: var(--soft); font-size: .85rem; padding-top: .1rem; }
dd { margin: 0; }
pre { background: var(--tile); border-radius: .5rem; padding: 1rem; overflow-x: auto; font-size: .85rem;
  line-height: 1.6; }
@media (prefers-color-scheme: dark) { .figure { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
  .pixels { opacity: .93; } }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; }
  .grid td { padding: .12rem; } .interval { display: block; margin: 0; } }
"""


def section(name: str, title: str, body: str) -> str:
    """A part of the page with the id `name`; `body` is HTML."""
    return f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>\n'


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def img(image: np.ndarray, alt: str) -> str:
    """One small image, uint8 [H, W, 3], a pixel a pixel: the browser enlarges it without smoothing."""
    height, width = image.shape[:2]
    return f'<img class="pixels" width="{width}" height="{height}" alt="{alt}" src="{_data_uri(to_png_bytes(image))}">'


def grid(images: np.ndarray, alt: str, kind: str) -> str:
    """Small images, uint8 [N, H, W, 3], in rows of eight; kind is "strip" or "eight"."""
    return f'<div class="{kind}">{"".join(img(image, alt) for image in images)}</div>'


def figure(png: bytes, alt: str) -> str:
    """A picture as wide as the text. In the dark its colours are turned, so that white paper becomes the page."""
    return f'<img class="figure" alt="{alt}" src="{_data_uri(png)}">'
