"""Small models whose every number matters, as published weights, for the tests of what is read and written."""

import json

import torch
from definition import opinionated

from igpt_fast import Config, ImageGPT, Palette

SIZES = {"layers": 2, "width": 24, "heads": 3, "colors": 11, "size": (4, 4)}
PALETTE = Palette(torch.linspace(-1, 1, 33).reshape(11, 3))


def make(**fields) -> ImageGPT:
    return opinionated(ImageGPT(Config(**{**SIZES, **fields})))


def same(a: ImageGPT, b: ImageGPT) -> bool:
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    return a.config == b.config and mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


def edit(path, **fields):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**values, **fields}.items() if value != "gone"}))
