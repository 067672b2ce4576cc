"""Finds modules that were replaced, hooked or extended: what reads weights alone would leave out what others added.

An adapter, a pruning or a quantisation replaces modules or hooks onto them. Whoever calls the modules computes with
it; what is saved, and the steps of sampling, know tensors only.
"""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from igpt_fast.config import Config
from igpt_fast.errors import InputError

FORWARD_HOOKS = "_forward_hooks", "_forward_pre_hooks"
HOOKS = *FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks"
HOME = "igpt_fast.model"  # where the classes of our modules are


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does no more than compute with its weights, as one of ours does."""
    return type(module).__module__ == HOME and "forward" not in module.__dict__ and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, its own or those of all modules."""
    return _has_any_global_hook() or any(module.__dict__.get(kind) for kind in HOOKS)


def tensors_to_save(model: nn.Module) -> dict[str, Tensor]:
    """An ImageGPT's parameters by name. Raises InputError where some are not its own, or where own ones are gone."""
    for name, module in model.named_modules():
        if module is not model and (reason := _replaced(module)):
            raise InputError(f"{name} {reason}, which no file of an ImageGPT has room for; {_REMEDY}")
    tensors = dict(model.named_parameters(remove_duplicate=False))
    _refuse_missing(model.config, tensors)
    if more := sorted(tensors.keys() - _names(model.config)):
        raise InputError(f"{more[0]} is no parameter of an ImageGPT, and no file of one has room for it; {_REMEDY}")
    return tensors


def refuse_changed(model: nn.Module) -> None:
    """InputError that names a module of the blocks whose call the steps of sampling would leave out."""
    for name, module in model.blocks.named_modules():
        reason = _replaced(module)
        if reason is None and any(getattr(module, kind) for kind in FORWARD_HOOKS):
            reason = "has hooks"
        if reason is not None:
            raise InputError(f"blocks.{name} {reason}, which the steps of sampling would leave out; {_REMEDY}")
    for name in ("embed", "position_table", "hidden", "forward"):
        if name in model.__dict__ or getattr(type(model), name).__module__ != HOME:
            raise InputError(
                f"the model has another {name}, which the steps of sampling would leave out; draw by calls of the model"
            )
    _refuse_missing(model.config, dict(model.named_parameters(remove_duplicate=False)))


def _refuse_missing(config: Config, tensors: dict[str, Tensor]) -> None:
    if gone := sorted(_names(config) - tensors.keys()):
        raise InputError(f"{gone[0]} is no parameter of the model any more; {_REMEDY}")


def _names(config: Config) -> set[str]:
    """Of an ImageGPT's parameters."""
    own = {"wte", "ln_f", "wtet"} | ({"sos"} if config.objective == "ar" else set())
    own |= {"wpe"} if config.positions == "learned" else {"wpe_row", "wpe_col"}
    own |= {"wclf"} if config.classes else set()
    linears = [f"{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")]
    linears += [name.replace("weight", "bias") for name in linears if config.bias]
    return own | {f"blocks.{layer}.{name}" for layer in range(config.layers) for name in ("ln_1", "ln_2", *linears)}


def _replaced(module: nn.Module) -> str | None:
    """What a module has become; None for one of ours as it was made."""
    if type(module) is nn.ModuleList:
        return None
    if type(module).__module__ != HOME:
        return f"is a {type(module).__name__}"
    if "forward" in module.__dict__:
        return "has another forward"
    if isinstance(module, nn.Linear) and set(module._parameters) != {"weight", "bias"}:
        return f"has the parameters {', '.join(sorted(module._parameters))}"
    return None


_REMEDY = "merge adapters into the weights, and remove what was added"
