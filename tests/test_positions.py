"""Axial position embeddings, and what becomes of any when a model is brought to images of another size."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from definition import transcript
from published import PALETTE, make, same
from safetensors.torch import load_file

from igpt_fast import Config, ImageGPT, InputError
from igpt_fast.checkpoint import load_checkpoint, save_checkpoint
from igpt_fast.positions import resized, summed
from igpt_fast.weights import open_model, reshaped


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_axial_positions_are_those_of_row_and_column(objective):
    model = make(positions="axial", size=(3, 5), objective=objective).double()
    assert {"wpe_row", "wpe_col"} < model.state_dict().keys() and "wpe" not in model.state_dict()
    tokens = torch.randint(11, (2, 3, 5))
    np.testing.assert_allclose(model(tokens).detach().numpy(), transcript(model, tokens)[0], rtol=0, atol=1e-9)
    model.loss(tokens, generator=torch.Generator().manual_seed(0)).backward()
    assert model.wpe_row.grad.abs().min() > 0 and model.wpe_col.grad.abs().min() > 0
    assert torch.equal(model.position_table()[7], model.wpe_row[1] + model.wpe_col[2])


def test_axial_positions_start_as_spread_as_learned_ones_and_are_fewer():
    torch.manual_seed(0)
    config = Config(layers=1, width=512, heads=8, size=(32, 48), positions="axial")
    model = ImageGPT(config)
    assert abs(model.position_table().std().item() / 0.01 - 1) < 0.05
    learned = replace(config, positions="learned")
    with torch.device("meta"):
        assert ImageGPT(learned).num_parameters() - model.num_parameters() == (32 * 48 - 32 - 48) * 512
    with pytest.raises(InputError, match="positions is 'sine'; use one of 'learned', 'axial'"):
        replace(config, positions="sine")


@pytest.mark.parametrize("fields", [{}, {"positions": "axial"}])
def test_checkpoints_hold_them(tmp_path, fields):
    model = make(**fields)
    save_checkpoint(tmp_path, 1, model)
    assert same(load_checkpoint(tmp_path).model, model)


def cubic(values: np.ndarray, count: int) -> np.ndarray:
    """[n, …] → [count, …] by Keys's bicubic kernel with a = -3/4, pixel centres aligned, edges repeated."""
    n, a, out = len(values), -0.75, []
    for i in range(count):
        at = (i + 0.5) * n / count - 0.5
        base, total = math.floor(at), 0
        for j in range(base - 1, base + 3):
            x = abs(at - j)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            total = total + (near if x <= 1 else far) * values[min(max(j, 0), n - 1)]
        out.append(total)
    return np.stack(out)


@pytest.mark.parametrize("new", [(6, 10), (4, 4), (3, 2), (3, 5), (7, 5)])
def test_tables_are_resampled_on_the_grid_of_predicted_pixels(new):
    old, generator = (3, 5), torch.Generator().manual_seed(0)
    wpe, rows, columns = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (15, 3, 5))
    found = resized({"wpe": wpe, "wte": wpe}, old, new)
    want = cubic(wpe.numpy().reshape(3, 5, 4), new[0])
    want = cubic(want.swapaxes(0, 1), new[1]).swapaxes(0, 1)
    np.testing.assert_allclose(found["wpe"].numpy().reshape(*new, 4), want, rtol=0, atol=1e-12)
    assert found["wte"] is wpe
    axial = resized({"wpe_row": rows, "wpe_col": columns}, old, new)
    np.testing.assert_allclose(axial["wpe_row"].numpy(), cubic(rows.numpy(), new[0]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(axial["wpe_col"].numpy(), cubic(columns.numpy(), new[1]), rtol=0, atol=1e-12)
    # Either order is the same: what is summed and then resampled is what is resampled and then summed.
    both = resized({"wpe": summed(rows, columns)}, old, new)["wpe"]
    torch.testing.assert_close(both, summed(axial["wpe_row"], axial["wpe_col"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"positions": "axial"}, {"objective": "bert", "pattern": "row"}], ids=str)
@pytest.mark.parametrize("kind", ["run", "weights"])
def test_models_are_opened_at_another_size(tmp_path, kind, fields, caplog):
    model = make(**fields)
    if kind == "run":
        save_checkpoint(tmp_path / "w", 1, model, PALETTE)
    else:
        model.save_pretrained(tmp_path / "w", PALETTE)
    own = open_model(tmp_path / "w", size=(4, 4)).model
    assert "resampled" not in caplog.text and own.config.size == (4, 4)
    found = open_model(tmp_path / "w", size=(6, 8)).model
    assert "position embeddings resampled from 4x4 to 6x8 pixels" in caplog.text
    assert found.config == replace(own.config, size=(6, 8))
    assert found(torch.randint(11, (2, 6, 8))).shape == (2, 48, 11)
    assert torch.equal(found.palette.centers, own.palette.centers)
    want = resized(dict(own.named_parameters()), (4, 4), (6, 8))
    assert all(torch.equal(p, want[name]) and p.requires_grad for name, p in found.named_parameters())
    if kind == "weights":
        assert same(ImageGPT.from_pretrained(tmp_path / "w", size=(6, 8)), found)


def test_a_constant_table_stays_one_and_so_do_bfloat16_weights():
    model = make().to(torch.bfloat16)
    with torch.no_grad():
        model.wpe.fill_(0.5)
    found = reshaped(model, replace(model.config, size=(5, 7)))
    assert found.wpe.dtype == torch.bfloat16 and bool((found.wpe == 0.5).all())


def test_only_size_pattern_and_a_classifier_that_is_left_out_may_differ():
    model = make(classes=3)
    other = reshaped(model, replace(model.config, pattern="row", classes=0))
    assert torch.equal(other.wtet, model.wtet) and not hasattr(other, "wclf") and other.config.pattern == "row"
    assert reshaped(model, model.config) is model
    for fields, message in (({"layers": 3}, "have layers 2, not 3"), ({"positions": "axial"}, "positions learned")):
        with pytest.raises(InputError, match=message):
            reshaped(model, replace(model.config, **fields))


def test_a_size_that_no_memory_holds_is_refused(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")

    monkeypatch.setattr(torch.nn.functional, "interpolate", full)
    with pytest.raises(InputError, match="of 9999x99999 pixels and 24 channels do not fit into memory; ask for a"):
        reshaped(make(), replace(make().config, size=(9999, 99999)))


def test_axial_tables_are_summed_and_patterns_kept_in_hugging_faces_layout(tmp_path, caplog):
    model = make(positions="axial", pattern=[["row", "column", None], "local(3)"])
    model.save_pretrained(tmp_path / "w")
    assert "transformers has no patterns and computes dense attention" in caplog.text
    theirs = load_file(tmp_path / "w" / "model.safetensors")["transformer.wpe.weight"]
    assert torch.equal(theirs, summed(model.wpe_row, model.wpe_col).detach())
    found = ImageGPT.from_pretrained(tmp_path / "w")
    assert found.config == replace(model.config, positions="learned")
    tokens = torch.randint(11, (2, 4, 4))
    assert torch.equal(found(tokens), model(tokens))
