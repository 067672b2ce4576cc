"""Weights from and to Hugging Face's ImageGPT (transformers): the same numbers under other names, all accounted for.

    ours                                theirs
    wte [V, d], sos [d]                 transformer.wte.weight [V + 1, d]; the last row is sos
    wpe, ln_f, wtet                     transformer.wpe.weight, transformer.ln_f.weight, lm_head.weight
    blocks.{l}.ln_1, .ln_2              transformer.h.{l}.ln_1.weight, .ln_2.weight
    blocks.{l}.attn.qkv, .proj          transformer.h.{l}.attn.c_attn, .c_proj; weights are [in, out], ours [out, in]
    blocks.{l}.mlp.fc, .proj            transformer.h.{l}.mlp.c_fc, .c_proj; likewise
    wclf                                score.weight

Theirs always has biases; ours has them (config.bias) only when one of theirs is not zero.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT

_TABLES = {
    "transformer.wpe.weight": "wpe",
    "transformer.ln_f.weight": "ln_f",
    "lm_head.weight": "wtet",
    "score.weight": "wclf",
}
_LINEARS = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj"}

# A causal mask and a constant that old files hold as buffers: not weights.
_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")

# What their config may ask of the forward pass that ours does not compute: field → the one value that means "nothing".
# reorder_and_upcast_attn only changes where theirs rounds; ours always accumulates attention in float32.
_UNSUPPORTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": False,
    "activation_function": "quick_gelu",
}


def from_hf(
    source: nn.Module | Mapping[str, Tensor],
    heads: int | None = None,
    size: tuple[int, int] | None = None,
    eps: float = 1e-5,
) -> ImageGPT:
    """An ImageGPT with the weights of a transformers ImageGPT model, or of its state dict; in their dtype, on the CPU.

    A model brings its number of heads and its eps with it; for a state dict give `heads` (S and M have 8, L has 16)
    and, when it is not 1e-5, `eps`. `size` (height, width) is needed when the positions are not a square. Key names may
    lack `transformer.`; the mask buffers of old files are skipped. Raises InputError that names what is missing,
    unknown or not supported.
    """
    if isinstance(source, nn.Module):
        heads, eps = _read_hf_config(source.config)
        source = source.state_dict()
    theirs = _canonical(source)
    if heads is None:
        raise InputError("a state dict does not say how many attention heads it has; pass heads= (S and M: 8, L: 16)")
    config = _infer_config(theirs, heads, size, eps)
    model = ImageGPT(config).to(theirs["transformer.wte.weight"].dtype)
    ours = _rename(theirs, config)
    for name, parameter in model.named_parameters():
        if ours[name].shape != parameter.shape:
            raise InputError(
                f"{name} would be {list(ours[name].shape)}, not {list(parameter.shape)}; the shapes do not fit together"
            )
    model.load_state_dict(ours)
    return model


def to_hf_state_dict(model: ImageGPT) -> dict[str, Tensor]:
    """The state dict that transformers' ImageGPTForCausalImageModeling loads. Biases that ours lacks are zero.

    A classifier head becomes score.weight. Raises InputError for a BERT model: transformers has no such ImageGPT.
    """
    c = model.config
    if c.objective != "ar":
        raise InputError("transformers' ImageGPT has no BERT mode; only objective='ar' models can be converted")
    ours = {name: p.detach() for name, p in model.named_parameters()}
    theirs = {"transformer.wte.weight": torch.cat((ours["wte"], ours["sos"][None]))}
    theirs.update({hf: ours[name].clone() for hf, name in _TABLES.items() if name in ours})
    for layer in range(c.layers):
        here, there = f"blocks.{layer}.", f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            theirs[f"{there}{norm}.weight"] = ours[here + norm].clone()
        for hf, name in _LINEARS.items():
            weight = ours[f"{here}{name}.weight"]
            theirs[f"{there}{hf}.weight"] = weight.t().clone(memory_format=torch.contiguous_format)
            bias = ours.get(f"{here}{name}.bias")
            theirs[f"{there}{hf}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    return theirs


def _read_hf_config(config: Any) -> tuple[int, float]:
    """(heads, eps) of a transformers ImageGPTConfig; InputError when it asks for what ours does not compute."""
    for field, nothing in _UNSUPPORTED.items():
        if (value := getattr(config, field, nothing)) != nothing:
            raise InputError(f"the model's config has {field}={value!r}, which is not supported; only {nothing!r} is")
    return config.n_head, config.layer_norm_epsilon


def _canonical(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under full names, without the mask buffers."""
    theirs = {}
    for name, tensor in source.items():
        if not _BUFFER.fullmatch(name):
            theirs[name if name.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{name}"] = tensor
    return theirs


def _infer_config(theirs: Mapping[str, Tensor], heads: int, size: tuple[int, int] | None, eps: float) -> Config:
    """The Config that the shapes tell."""
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"):
        if name not in theirs:
            raise InputError(f"the state dict has no {name}; it is not an ImageGPT's, or only a part of one")
    (rows, width), positions = theirs["transformer.wte.weight"].shape, len(theirs["transformer.wpe.weight"])
    if size is None:
        side = math.isqrt(positions)
        if side * side != positions:
            raise InputError(f"{positions} positions are not a square; pass size=(height, width)")
        size = (side, side)
    elif size[0] * size[1] != positions:
        raise InputError(f"size {size[0]}x{size[1]} does not fit the state dict's {positions} positions")
    blocks = {int(m[1]) for name in theirs if (m := re.match(r"transformer\.h\.(\d+)\.", name))}
    return Config(
        layers=max(blocks) + 1,
        width=width,
        heads=heads,
        colors=rows - 1,
        size=size,
        bias=any(bool(tensor.any()) for name, tensor in theirs.items() if name.endswith(".bias")),
        classes=len(theirs.get("score.weight", ())),
        mlp_width=theirs["transformer.h.0.mlp.c_fc.weight"].shape[1],
        eps=eps,
    )


def _rename(theirs: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Their tensors under our names and in our layouts; InputError naming any that is missing or left over."""
    left = dict(theirs)

    def take(name: str) -> Tensor:
        if name not in left:
            raise InputError(f"the state dict has no {name}")
        return left.pop(name)

    wte = take("transformer.wte.weight")
    ours = {"wte": wte[:-1], "sos": wte[-1]}
    for hf, name in _TABLES.items():
        if name != "wclf" or config.classes:
            ours[name] = take(hf)
    for layer in range(config.layers):
        here, there = f"blocks.{layer}.", f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            ours[here + norm] = take(f"{there}{norm}.weight")
        for hf, name in _LINEARS.items():
            ours[f"{here}{name}.weight"] = take(f"{there}{hf}.weight").t()
            bias = left.pop(f"{there}{hf}.bias", None)
            if config.bias:
                ours[f"{here}{name}.bias"] = wte.new_zeros(len(ours[f"{here}{name}.weight"])) if bias is None else bias
    if left:
        raise InputError(f"the state dict holds {', '.join(sorted(left))}, which an ImageGPT does not have")
    return ours
