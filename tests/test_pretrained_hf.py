"""Directories that transformers writes and reads: equal logits on both sides, the same bits after any round trip."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from published import PALETTE, make, same
from safetensors.torch import load_file
from test_weights import compare, theirs, transformers

from igpt_fast import ImageGPT, InputError, Palette
from igpt_fast.pretrained import settings
from igpt_fast.weights import from_hf

ROUNDS = transformers.utils.torch_float(2.5) == 2  # up to 5.12 at least: the head dim's root loses its fraction


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_theirs_then_ours_then_theirs_then_ours(tmp_path, biases, shards):
    hf = theirs(biases=biases, n_inner=40, layer_norm_epsilon=1e-4)
    hf.save_pretrained(tmp_path / "a", max_shard_size="20KB" if shards else "1GB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1 or not shards
    ours = ImageGPT.from_pretrained(tmp_path / "a")
    assert ours.config.eps == 1e-4 and ours.config.mlp_width == 40 and ours.config.bias == biases
    assert compare(hf, ours, n=3) <= 1e-4
    ours.save_pretrained(tmp_path / "b")
    again = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "b", attn_implementation="eager")
    assert equal(again.state_dict(), hf.state_dict())
    assert compare(again.eval(), ours, n=3) <= 1e-4
    again.save_pretrained(tmp_path / "c")
    assert same(ImageGPT.from_pretrained(tmp_path / "c"), ours)


@pytest.mark.parametrize("upcast", [False, True])
def test_logits_equal_theirs_at_m_width(tmp_path, upcast):
    if ROUNDS and not upcast:
        pytest.skip(f"transformers {transformers.__version__} divides by 11, not by the root of 128")
    sizes = {"n_layer": 2, "n_embd": 1024, "n_head": 8, "n_positions": 1024, "vocab_size": 513}
    theirs(**sizes, reorder_and_upcast_attn=upcast).save_pretrained(tmp_path)
    hf = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = ImageGPT.from_pretrained(tmp_path)
    assert (ours.config.head_dim, ours.config.tokens) == (128, 1024)
    assert compare(hf, ours, n=1) <= 1e-4


def test_a_model_of_ours_loads_there(tmp_path):
    ours = make(bias=True, mlp_width=40, eps=1e-3)
    ours.save_pretrained(tmp_path, PALETTE)
    hf = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert compare(hf, ours, n=3) <= 1e-4
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "ImageGPTConfig" and config.attn_pdrop == 0


def test_a_classifier_loads_there_and_here(tmp_path, caplog):
    ours = make(classes=5)
    ours.class_names = ("cat", "dog", "LABEL_2", "ü", "5")
    ours.save_pretrained(tmp_path / "a")
    hf = transformers.ImageGPTForImageClassification.from_pretrained(tmp_path / "a").eval()
    tokens = torch.randint(11, (3, 16))
    shifted = torch.cat((torch.full((3, 1), 11), tokens[:, :-1]), dim=1)  # theirs leaves the shift to the caller
    with torch.no_grad():
        want, found = hf(input_ids=shifted).logits, ours.classify(tokens)
    assert (found - want).abs().max() <= 1e-4 * want.abs().max()
    hf.save_pretrained(tmp_path / "b")
    back = ImageGPT.from_pretrained(tmp_path / "b")
    assert "learned without sos" not in caplog.text
    settings = json.loads((tmp_path / "b/config.json").read_text())
    del settings["igpt_fast"]  # as transformers trains it
    (tmp_path / "b/config.json").write_text(json.dumps(settings))
    ImageGPT.from_pretrained(tmp_path / "b")
    assert "if its classes were learned without sos before the pixels" in caplog.text
    assert not back.wtet.any() and torch.equal(back.wclf, ours.wclf) and torch.equal(back.wte, ours.wte)
    assert same(from_hf(hf), back)
    assert [hf.config.id2label[row] for row in range(5)] == list(ours.class_names) and hf.config.label2id["ü"] == 3
    assert from_hf(hf).class_names == back.class_names == ours.class_names
    assert from_hf(hf.state_dict(), heads=3).class_names is None


def test_the_bare_model_has_no_output_table(tmp_path, caplog):
    hf = theirs()
    hf.transformer.save_pretrained(tmp_path)
    assert not any(name.startswith("transformer.") for name in load_file(tmp_path / "model.safetensors"))
    ours = ImageGPT.from_pretrained(tmp_path)
    assert "has no output table" in caplog.text
    assert torch.equal(
        ours.features(torch.zeros(1, 16, dtype=torch.int64)), from_hf(hf).features(torch.zeros(1, 16).int())
    )
    ours.save_pretrained(tmp_path / "again")
    again = transformers.ImageGPTModel.from_pretrained(tmp_path / "again")
    assert equal(again.state_dict(), hf.transformer.state_dict())


def test_features_are_means_of_what_their_attention_reads():
    hf = theirs(biases=True, n_layer=3)
    ours, found = from_hf(hf), []
    norms = [*(block.ln_1 for block in hf.transformer.h), hf.transformer.ln_f]
    for norm in norms:
        norm.register_forward_hook(lambda *args: found.append(args[2].mean(1)))
    tokens = torch.randint(11, (3, 16))
    with torch.no_grad():
        hf(input_ids=torch.cat((torch.full((3, 1), 11), tokens[:, :-1]), dim=1))
        pooled, hidden = ours.features(tokens), ours.hidden(tokens)
        states = hf.transformer(torch.cat((torch.full((3, 1), 11), tokens[:, :-1]), dim=1))[0]
    want = torch.stack(found[: len(norms)])
    assert (pooled - want).abs().max() <= 1e-4 * want.abs().max()
    assert (hidden - states).abs().max() <= 1e-4 * states.abs().max()


def test_bert_weights_are_refused_there(tmp_path):
    make(objective="bert").save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError)):
        transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path)


def processor_class():
    """The one that computes in numpy: its name in transformers 5, then in 4."""
    return getattr(transformers, "ImageGPTImageProcessorPil", None) or transformers.ImageGPTImageProcessor


@pytest.mark.parametrize("colors", [7, 512])
def test_palette_gives_their_processors_tokens(tmp_path, colors):
    random = np.random.default_rng(colors)
    noise = random.integers(0, 256, (6, 8, 8, 3), np.uint8)
    ramps = (np.indices((8, 8)).sum(0)[None, ..., None] * random.integers(1, 18, (6, 1, 1, 3))).astype(np.uint8)
    images = np.concatenate([noise, ramps])
    palette = Palette(torch.from_numpy(random.uniform(-1, 1, (colors, 3)).astype(np.float32)))
    model = make(colors=colors, size=(8, 8))
    model.save_pretrained(tmp_path, palette)
    processor = processor_class().from_pretrained(tmp_path)
    want = processor(list(images), do_resize=False, return_tensors="pt")["input_ids"]
    assert np.array_equal(palette.encode(images).reshape(len(images), -1), np.asarray(want).reshape(len(images), -1))
    resized = processor(list(images), return_tensors="pt")["input_ids"]  # to the size that was saved: as they are
    assert np.array_equal(np.asarray(resized), np.asarray(want))
    processor.save_pretrained(tmp_path / "theirs")
    os.rename(tmp_path / "theirs" / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    back = ImageGPT.from_pretrained(tmp_path).palette
    assert torch.equal(back.centers, palette.centers)


HUB = """
import sys
from igpt_fast import ImageGPT, InputError
model = ImageGPT.from_pretrained("someone/small")
print(len(model.palette), model.config.layers, model.wte.detach().double().sum().item())
assert ImageGPT.from_pretrained("someone/small@v1").config == model.config
for name in ("someone/other", "someone/small@v2", "someone/bare"):
    try:
        ImageGPT.from_pretrained(name)
    except InputError as error:
        print(error)
assert "transformers" not in sys.modules
"""


def test_names_are_looked_up_in_the_hubs_cache_when_offline(tmp_path):
    model = make()
    total = model.wte.detach().double().sum().item()
    for name in ("small", "bare"):
        root = tmp_path / "hub" / f"models--someone--{name}"
        snapshot = root / "snapshots" / ("0123456789" * 4)
        model.save_pretrained(snapshot, PALETTE)
        (root / "refs").mkdir()
        for ref in ("main", "v1"):
            (root / "refs" / ref).write_text(snapshot.name)
    os.unlink(snapshot / "model.safetensors")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"11 2 {total}"
    assert lines[1].startswith("there is no directory someone/other, and the Hugging Face hub gives no config.json")
    assert lines[2].startswith("there is no directory someone/small@v2, and")
    assert lines[3].startswith("someone/bare holds no weights") and len(lines) == 4


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"there is no directory a/b, .*pip install igpt-fast\[hf\]"):
        ImageGPT.from_pretrained("a/b")


def test_settings_are_those_that_transformers_writes(tmp_path):
    """Whatever a config of theirs holds by itself is known here by name: nothing is said about it."""
    config = transformers.ImageGPTConfig(n_layer=1, n_embd=8, n_head=1, n_positions=4, vocab_size=3)
    model = transformers.ImageGPTForCausalImageModeling(config)
    model.save_pretrained(tmp_path)
    full = {**json.loads(config.to_json_string(use_diff=False)), "architectures": None}
    (tmp_path / "config.json").write_text(json.dumps(full))
    known = settings._UNSUPPORTED.keys() | settings._HARMLESS | settings._SHAPES.keys()
    assert not full.keys() - known
    assert ImageGPT.from_pretrained(tmp_path).config.layers == 1
