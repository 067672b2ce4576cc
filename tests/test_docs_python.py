"""Every Python block in README.md and docs/ runs as it is shown, on a model that is small."""

import re
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from test_docs import PAGES

import igpt_fast as igpt
from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.data import tokenize

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

# What the blocks say, and what is run: 64 colours, 8 × 8 pixels, two layers.
SMALLER = {
    "layers=8, width=256, heads=4, size=64": "layers=4, width=16, heads=2, size=8",
    "layers=8, width=256, heads=4": "layers=2, width=16, heads=2, colors=64, size=8",
    "colors=512": "colors=64",
    "(4, 1), 512": "(4, 1), 64",
    "randint(512, (4, 1023))": "randint(64, (4, 63))",
    "max_new_tokens=1024": "max_new_tokens=64",
    "layer=12": "layer=1",
    "steps=500": "steps=2",
    "openai/imagegpt-small": "published",
}


def blocks(text):
    """Fenced ones, and those that are indented and import something."""
    indented = (textwrap.dedent(part).strip("\n") for part in re.findall(r"(?:^(?:    .*|)\n)+", text, re.M))
    return [code for code in indented if "import " in code] + re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What readers have: images, labels, a folder of classes, tokens, a run, CIFAR-10, published weights."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    model = igpt.ImageGPT(igpt.Config(layers=2, width=16, heads=2, colors=64, size=8))
    torch.nn.init.normal_(model.wtet, std=0.1)
    model.save_pretrained("published", palette=igpt.Palette.fit(images, colors=64))
    for name in ("a", "b"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        Image.fromarray(images[0]).save(f"scans/{name}/0.png")
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        np.zeros(2 * 3073, np.uint8).tofile(f"cifar-10-batches-bin/{name}.bin")
    np.savez("labelled.npz", images=images.repeat(2, 0), labels=np.arange(24) % 2)
    for name in ("tokens", "new-tokens"):
        tokenize("labelled.npz", "published", name, (8, 8), resize="none", workers=0)
    save_checkpoint("run", 1, model, igpt.Palette.load("published"))
    q = torch.randn(1, 2, 16, 8)
    return {"images": images, "labels": np.arange(12) % 2, "batch": torch.rand(2, 3, 20, 13), "q": q, "k": q, "v": q}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("benchmarks.md", "gpu.md")], ids=lambda p: p.name)
def test_blocks_run(page, given):
    found = blocks(page.read_text())
    assert found, f"{page.name} shows no Python"
    for code in found:
        for shown, small in SMALLER.items():
            code = code.replace(shown, small)
        exec(compile(code, page.name, "exec"), given)
