"""OpenAI's checkpoints as variables by name, without TensorFlow: which shapes mean what, and which are refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from openai_checkpoint import variable, variables

from igpt_fast import InputError
from igpt_fast.config import PRESETS
from igpt_fast.pretrained import openai

OF = {"layers": 2, "width": 16, "heads": 2, "colors": 9, "pixels": 16}


@pytest.fixture
def read(monkeypatch):
    """Reads variables as if they lay in a checkpoint: read(found, heads=…)."""

    def call(found, **given):
        entries = {name: SimpleNamespace(shape=np.shape(value)) for name, value in found.items()}
        held = SimpleNamespace(
            path="x.index", entries=entries, read=lambda name: torch.from_numpy(np.array(found[name]))
        )
        monkeypatch.setattr(openai, "Bundle", lambda prefix: held)
        return openai.read_openai(Path("x"), **given)

    return call


def test_older_shapes_mean_one_thing_or_are_refused(read):
    found = variables(**OF)
    config, want = read(found)
    assert config.heads == 2 and config.size == (4, 4)
    old = dict(found)
    for name in ("model/wpe", "model/sos", "model/h0/mlp/c_fc/w", "model/h1/attn/c_proj", "model/h1/attn/k_proj"):
        old[name] = found[name][None]
    for name in "qkvc":
        old[f"model/h0/attn/{name}_proj"] = found[f"model/h0/attn/{name}_proj"].reshape(16, 16)
    old["model/h0/attn/c_proj"] = old["model/h0/attn/c_proj"][None]
    with pytest.raises(InputError, match="the number of heads; give it"):
        read(old)
    again, ours = read(old, heads=2)
    assert again == config and all(torch.equal(ours[name], want[name]) for name in want)
    for name, shape, message in (
        ("h0/attn/q_proj", (1, 16, 16), r"q_proj is \[1, 16, 16\], which is not"),
        ("h1/attn/v_proj", (16, 2, 8), r"v_proj is \[16, 2, 8\], which is not"),
        ("h1/attn/c_proj", (16, 16, 1), r"c_proj is \[16, 16, 1\], which is not"),
        ("ln_f/g", (2, 16), r"ln_f/g is \[2, 16\], which is not \[16\]"),
        ("wte", (9, 1, 16), r"model/wte is \[9, 1, 16\]; it has 2 axes"),
        ("wte", (16,), r"model/wte is \[16\]; it has 2 axes"),
        ("h1/mlp/c_fc/b", (64,), "holds model/h1/mlp/c_fc/b, which an Image GPT of 2 layers has not"),
    ):
        with pytest.raises(InputError, match=message):
            read(found | {f"model/{name}": np.ones(shape, np.float32)}, heads=2)


def test_a_checkpoint_of_an_optimizer_a_classifier_and_another_mlp(read):
    found = variables(**OF)
    found |= {f"model/wte/{slot}": found["model/wte"] for slot in ("Adam", "Adam_1", "adam_m", "adam_v")}
    found |= {"beta1_power": np.float32(1), "model/beta2_power": np.float32(1), "train_step": np.int64(3)}
    found |= {"model/clf/wclf": variable("clf", (5, 16))}
    for layer in range(2):
        found[f"model/h{layer}/mlp/c_fc/w"] = variable("fc", (16, 40))
        found[f"model/h{layer}/mlp/c_proj/w"] = variable("proj", (40, 16))
    del found["model/sos"]
    config, ours = read(found)
    assert (config.objective, config.classes, config.mlp_width) == ("bert", 5, 40)
    assert ours["blocks.1.mlp.fc.weight"].shape == (40, 16) and ours["wclf"].shape == (5, 16)


def test_the_number_of_heads_is_that_of_the_projections_or_the_one_given_or_a_published_models(read):
    found = variables(**OF)
    with pytest.raises(InputError, match="its projections have 2 heads, not 4; leave the number out"):
        read(found, heads=4)
    preset = PRESETS["S"]
    layers, width = preset["layers"], preset["width"]
    shapes = {"wte": (512, width), "wpe": (1024, width), "h0/attn/q_proj": (width, width)}
    shapes |= {"h0/mlp/c_fc/w": (width, 4 * width), f"h{layers - 1}/ln_1/g": (width,)}

    def heads(given, last=layers - 1):
        named = {(f"h{last}/ln_1/g" if "ln_1" in name else name): shape for name, shape in shapes.items()}
        bundle = SimpleNamespace(path="x", entries={n: SimpleNamespace(shape=s) for n, s in named.items()})
        return openai._infer_config(bundle, {name: name for name in named}, given, None).heads

    assert heads(None) == preset["heads"] and heads(2) == 2 and heads(4, last=2) == 4
    with pytest.raises(InputError, match="does not tell the number of heads; give it"):
        heads(None, last=2)
