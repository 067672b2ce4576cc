"""Modules that somebody has replaced or watches are computed with, or refused by name; never left out in silence."""

import pytest
import torch
from labelled import make as labelled_model
from labelled import write_tokens
from torch import nn
from torch.nn.utils import parametrize, prune

from igpt_fast import Config, ImageGPT, InputError, sample
from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.train import train
from igpt_fast.weights import to_hf_state_dict

LINEARS = "attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"


class Adapter(nn.Linear):
    """A low rank beside the weights of another linear, as libraries for it have it."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.down, self.up = (nn.Parameter(torch.randn(n, 2)) for n in (base.in_features, base.out_features))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + x @ self.down @ self.up.t()


class Wrapper(nn.Module):
    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def make() -> ImageGPT:
    torch.manual_seed(0)
    model = ImageGPT(Config(layers=2, width=32, heads=2, colors=8, size=(4, 4), bias=True))
    nn.init.normal_(model.wtet)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.3)  # of zeros nobody would see that one is left out, or added twice
    return model


def replace(model: ImageGPT, name: str, kind: type) -> nn.Module:
    room, own = name.split(".")
    base = getattr(getattr(model.blocks[1], room), own)
    setattr(getattr(model.blocks[1], room), own, made := kind(base))
    return made


def tokens() -> torch.Tensor:
    return torch.randint(8, (3, 4, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LINEARS)
def test_an_adapter_learns_and_counts(name):
    model, merged = make(), make()
    adapter = replace(model, name, Adapter)
    with torch.no_grad():
        merged.blocks[1].get_submodule(name).weight += adapter.up @ adapter.down.t()
    loss = model.loss(tokens())
    loss.backward()
    assert torch.allclose(loss, merged.loss(tokens()), rtol=1e-5) and adapter.down.grad.abs().max() > 0
    assert abs(loss - make().loss(tokens())).item() > 1e-3


@pytest.mark.parametrize("name", LINEARS)
def test_a_hook_is_called(name):
    model, seen = make(), []
    model.blocks[1].get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(out.shape))
    model.blocks[0].get_submodule(name).register_full_backward_hook(lambda *_: seen.append("backward"))
    model.loss(tokens()).backward()
    assert len(seen) == 2 and seen[1] == "backward"


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model, name: replace(model, name, Adapter), "is a Adapter"),
        (lambda model, name: replace(model, name, Wrapper), "is a Wrapper"),
        (
            lambda model, name: parametrize.register_parametrization(
                model.blocks[1].get_submodule(name), "weight", Doubled()
            ),
            "is a ParametrizedLinear",
        ),
        (
            lambda model, name: prune.l1_unstructured(model.blocks[1].get_submodule(name), "weight", 0.5),
            "has the parameters bias, weight_orig",
        ),
        (
            lambda model, name: setattr(model.blocks[1].get_submodule(name), "forward", lambda x: x),
            "has another forward",
        ),
    ],
)
def test_what_knows_tensors_only_refuses_changed_modules(tmp_path, name, change, what):
    model = make()
    change(model, name)
    for work in (
        lambda: sample(model, n=1),
        lambda: model.save_pretrained(tmp_path / "weights"),
        lambda: save_checkpoint(tmp_path / "run", 1, model),
        lambda: to_hf_state_dict(model),
    ):
        with pytest.raises(InputError, match=rf"blocks\.1\.{name} {what}, which .*; merge adapters into the weights"):
            work()
    assert not (tmp_path / "weights").exists() and not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.parametrize("name", ["wte", "wtet", "ln_f", "sos", "wpe", "blocks.1.ln_1", "blocks.0.ln_2"])
@pytest.mark.parametrize("change", ["pruned", "parametrized"])
def test_parameters_that_are_gone_are_missed(tmp_path, name, change):
    model = make()
    room, _, own = name.rpartition(".")
    if change == "pruned":
        prune.l1_unstructured(model.get_submodule(room), own, 0.5)
    else:
        parametrize.register_parametrization(model.get_submodule(room), own, Doubled())
    for work in (lambda: sample(model, n=1), lambda: model.save_pretrained(tmp_path / "weights")):
        with pytest.raises(InputError, match="merge adapters into the weights"):
            work()


def test_more_than_a_model_holds_is_not_saved(tmp_path):
    model = make()
    model.more = nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match="more is no parameter of an ImageGPT"):
        save_checkpoint(tmp_path, 1, model)
    assert sample(model, n=1).shape == (1, 4, 4)


@pytest.mark.parametrize("name", ["1", "1.mlp", "0.attn.proj"])
def test_steps_of_sampling_refuse_hooks(name):
    model = make()
    handle = model.blocks.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=rf"blocks\.{name} has hooks, which the steps of sampling would leave out"):
        sample(model, n=1)
    handle.remove()
    assert sample(model, n=1).shape == (1, 4, 4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_the_model():
    model, other = make().eval(), tokens().flip(0)
    traced = torch.jit.trace(model, tokens(), check_trace=False)
    assert torch.allclose(traced(other), model(other), atol=1e-4)


@pytest.mark.parametrize("every", [nn.modules.module.register_module_forward_hook, "pre"])
def test_hooks_of_all_modules_see_every_linear(every):
    """A profiler's, as a count of operations has them."""
    every = nn.modules.module.register_module_forward_pre_hook if every == "pre" else every
    model, seen = make(), []
    handle = every(lambda module, *_: seen.append(module))
    try:
        model.loss(tokens())
    finally:
        handle.remove()
    for block in model.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj):
            assert any(module is linear for module in seen)


def test_steps_of_sampling_refuse_another_embedding():
    class Shifted(ImageGPT):
        def embed(self, pixels, keep=None):
            return super().embed(pixels, keep) + 1

    with pytest.raises(InputError, match="the model has another embed, which the steps of sampling would leave out"):
        sample(Shifted(make().config), n=1)


def test_adapters_are_refused_before_they_learn(tmp_path):
    model, dataset = labelled_model(), write_tokens(tmp_path, [0, 1] * 4)
    model.blocks[0].attn.qkv = nn.Sequential(model.blocks[0].attn.qkv)
    with pytest.raises(InputError, match="merge adapters into the weights"):
        train(dataset, tmp_path / "run", init=model, steps=1, batch=4)
    assert not (tmp_path / "run/checkpoints").exists()


def test_dropout_of_adapters_is_the_same_when_it_is_recomputed():
    runs = []
    for again in (False, True):
        model = make()
        model.activation_checkpointing = again
        model.blocks[0].attn.qkv = nn.Sequential(model.blocks[0].attn.qkv, nn.Dropout(0.5))
        torch.manual_seed(1)
        model.loss(tokens()).backward()
        runs.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", LINEARS)
def test_a_forward_of_ones_own_is_computed(name):
    model = make()
    linear = model.blocks[1].get_submodule(name)
    linear.forward = lambda x: torch.zeros(*x.shape[:-1], linear.out_features)
    silent = make()
    for parameter in silent.blocks[1].get_submodule(name).parameters():
        nn.init.zeros_(parameter)
    assert torch.allclose(model.loss(tokens()), silent.loss(tokens()), rtol=1e-5)
    assert abs(model.loss(tokens()) - make().loss(tokens())).item() > 1e-4


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_of_each_kind_is_called(name, kind):
    model, seen = make(), []
    getattr(model.blocks[1].get_submodule(name), f"register_{kind}_hook")(lambda *_: seen.append(kind))
    model.loss(tokens()).backward()
    assert seen == [kind]


@pytest.mark.parametrize("name", ["1", "1.mlp", "0.attn.proj"])
def test_steps_refuse_pre_hooks(name):
    model = make()
    model.blocks.get_submodule(name).register_forward_pre_hook(lambda *_: None)
    with pytest.raises(InputError, match=rf"blocks\.{name} has hooks, which the steps of sampling would leave out"):
        sample(model, n=1)


@pytest.mark.parametrize("name", ["embed", "position_table", "hidden", "forward"])
@pytest.mark.parametrize("own", [False, True])
def test_steps_refuse_a_method_of_ones_own(name, own):
    model = make()
    if own:
        setattr(model, name, getattr(model, name))
    else:
        model = type("Other", (ImageGPT,), {name: lambda self, *a, **k: getattr(ImageGPT, name)(self, *a, **k)})(
            model.config
        )
    with pytest.raises(InputError, match=f"the model has another {name}, which the steps of sampling would leave out"):
        sample(model, n=1)


def test_a_module_that_is_there_twice_is_both(tmp_path):
    model = make()
    model.blocks[1].mlp = model.blocks[0].mlp
    model.save_pretrained(tmp_path / "w")
    assert sample(model, n=1).shape == (1, 4, 4)


class Sublist(nn.ModuleList):
    pass


def test_a_list_of_another_kind_is_named(tmp_path):
    model = make()
    model.blocks = Sublist(model.blocks)
    with pytest.raises(InputError, match="blocks is a Sublist"):
        model.save_pretrained(tmp_path / "w")


def test_a_class_of_ones_own_is_saved_and_what_is_gone_is_missed(tmp_path):
    model = type("Mine", (ImageGPT,), {})(make().config)
    model.save_pretrained(tmp_path / "mine")
    assert sample(model, n=1).shape == (1, 4, 4)
    for name in ("sos", "wpe", "ln_f"):
        model = make()
        del model._parameters[name]
        with pytest.raises(InputError, match=f"{name} is no parameter of the model any more"):
            model.save_pretrained(tmp_path / name)


@pytest.mark.parametrize("fields", [{"bias": False}, {"objective": "bert"}, {"positions": "axial"}, {"classes": 3}])
def test_every_kind_of_model_is_saved(tmp_path, fields):
    from dataclasses import replace

    from igpt_fast.checkpoint import save_checkpoint

    model = ImageGPT(replace(make().config, **fields))
    save_checkpoint(tmp_path, 1, model)
