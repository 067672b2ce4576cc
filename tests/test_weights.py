"""Our logits equal those of transformers' ImageGPT with the same weights, which cross both ways exactly."""

import pytest
import torch
from published import make

from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.weights import from_hf, to_hf_state_dict

transformers = pytest.importorskip("transformers", reason="the comparison with transformers needs the [hf] extra")


def theirs(seed=0, biases=False, **fields):
    """A transformers model with random weights, every one of which matters."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 16, "vocab_size": 12}
    config = transformers.ImageGPTConfig(**{**sizes, **fields}, attn_implementation="eager")
    model = transformers.ImageGPTForCausalImageModeling(config).eval()
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p, std=0.1 * biases)
        elif p.dim() == 1:
            torch.nn.init.normal_(p, mean=1, std=0.2)
    return model


@torch.no_grad()
def compare(hf, ours, n):
    """Largest difference over largest logit. Theirs reads sos as a token, then all pixels but the last."""
    colors, count = hf.config.vocab_size - 1, hf.config.n_positions
    tokens = torch.randint(colors, (n, count), generator=torch.Generator().manual_seed(3))
    shifted = torch.cat((torch.full((n, 1), colors), tokens[:, :-1]), dim=1)
    want = hf(input_ids=shifted).logits
    return ((ours(tokens) - want).abs().max() / want.abs().max()).item()


def test_what_a_model_brings_is_not_said_again():
    hf = theirs()
    for more in ({"heads": 4}, {"eps": 1e-5}):
        with pytest.raises(InputError, match="a model brings its own heads and eps; leave out heads= and eps="):
            from_hf(hf, **more)
    assert from_hf(hf.state_dict(), heads=4, eps=1e-3).config.eps == 1e-3
    assert from_hf(hf.state_dict(), heads=4).config.eps == 1e-5


@pytest.mark.parametrize("biases", [False, True])
def test_logits_equal_theirs_at_s_width(biases):
    hf = theirs(biases=biases, n_layer=2, n_embd=512, n_head=8, n_positions=256, vocab_size=513)
    ours = from_hf(hf)
    assert ours.config == Config(layers=2, width=512, heads=8, colors=512, size=(16, 16), bias=biases)
    assert compare(hf, ours, n=2) <= 1e-4


def test_logits_equal_theirs_at_the_whole_of_s():
    hf = theirs(n_layer=24, n_embd=512, n_head=8, n_positions=1024, vocab_size=513)
    ours = from_hf(hf)
    assert ours.config == Config.preset("S")
    assert compare(hf, ours, n=1) <= 1e-4


@pytest.mark.parametrize("biases", [False, True])
def test_weights_cross_both_ways_without_a_change(biases):
    hf = theirs(biases=biases, n_inner=40)
    state = hf.state_dict()
    back = to_hf_state_dict(from_hf(hf))
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].is_contiguous()
    other = theirs(seed=1, n_inner=40)
    other.load_state_dict(back)
    assert compare(other, from_hf(hf), n=2) <= 1e-4


def test_a_model_of_ours_becomes_one_of_theirs():
    torch.manual_seed(0)
    ours = ImageGPT(Config(layers=2, width=64, heads=4, colors=11, size=(4, 4)))
    torch.nn.init.normal_(ours.wtet, std=0.3)
    hf = theirs()
    hf.load_state_dict(to_hf_state_dict(ours))
    assert compare(hf, ours, n=3) <= 1e-4


def test_old_files_load():
    """Mask buffers in place, and the `transformer.` prefix gone."""
    hf = theirs(biases=True)
    state = hf.state_dict()
    old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert compare(hf, from_hf(old, heads=4), n=2) <= 1e-4


def test_grids_that_are_not_square_are_named_by_the_caller():
    state = theirs(n_positions=24).state_dict()
    assert from_hf(state, heads=4, size=(4, 6)).config.size == (4, 6)
    with pytest.raises(InputError, match="24 positions are not a square"):
        from_hf(state, heads=4)
    with pytest.raises(InputError, match="5x5 does not fit"):
        from_hf(state, heads=4, size=(5, 5))


def test_dtype_and_classifier_come_along():
    state = theirs().bfloat16().state_dict() | {"score.weight": torch.randn(7, 64).bfloat16()}
    ours = from_hf(state, heads=4)
    assert ours.wte.dtype == torch.bfloat16
    assert torch.equal(ours.wclf, state["score.weight"])
    assert torch.equal(to_hf_state_dict(ours)["score.weight"], state["score.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), "has no lm_head.weight"),
        (lambda s: s.pop("transformer.h.1.ln_2.weight"), "has no transformer.h.1.ln_2.weight"),
        (lambda s: s.pop("transformer.wte.weight"), "has no transformer.wte.weight"),
        (
            lambda s: s.update({"transformer.h.0.attn.q_attn.weight": torch.ones(3)}),
            "holds transformer.h.0.attn.q_attn",
        ),
        (lambda s: s.update({"lm_head.weight": torch.ones(9, 64)}), r"lm_head.weight as \[9, 64\], not \[11, 64\]"),
    ],
)
def test_state_dicts_that_are_not_whole_are_refused(change, message):
    state = dict(theirs().state_dict())
    change(state)
    with pytest.raises(InputError, match=message):
        from_hf(state, heads=4)


def test_a_bare_state_dict_must_come_with_its_heads():
    with pytest.raises(InputError, match="pass heads="):
        from_hf(theirs().state_dict())


@pytest.mark.parametrize(
    "field",
    [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"activation_function": "gelu"}],
)
def test_what_we_do_not_compute_is_refused_by_name(field):
    with pytest.raises(InputError, match=next(iter(field))):
        from_hf(theirs(**field))


def test_a_bert_model_has_no_counterpart():
    with pytest.raises(InputError, match="BERT"):
        to_hf_state_dict(ImageGPT(Config(layers=1, width=8, heads=1, size=(2, 2), objective="bert")))


def test_a_state_dict_says_the_width_of_the_mlp_and_that_a_matrix_lies_on_its_side():
    model = make(mlp_width=40)
    theirs = to_hf_state_dict(model)
    found = from_hf(theirs, heads=3)
    assert found.config == model.config and torch.equal(found.blocks[1].mlp.fc.weight, model.blocks[1].mlp.fc.weight)
    name = "transformer.h.1.attn.c_attn.weight"
    with pytest.raises(InputError, match=rf"{name} as \[72, 24\], not \[24, 72\]: shapes do not fit"):
        from_hf({**theirs, name: theirs[name].T}, heads=3)
