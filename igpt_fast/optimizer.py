"""Adam as the paper has it, and its state as named tensors for a checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor

from igpt_fast.errors import InputError

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")


def adam(named: Mapping[str, Tensor]) -> torch.optim.Adam:
    """Fused Adam over the named parameters. The learning rate is 0 until a step sets it."""
    return torch.optim.Adam(list(named.values()), lr=0.0, betas=BETAS, fused=True)


def state_tensors(optimizer: torch.optim.Adam, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments under flat names such as `exp_avg.wte`; empty before the first step. Views, not copies."""
    state = optimizer.state
    return {f"{key}.{name}": state[p][key] for name, p in named.items() if p in state for key in MOMENTS}


def restore(optimizer: torch.optim.Adam, named: Mapping[str, Tensor], tensors: Mapping[str, Tensor], step: int) -> None:
    """Gives the optimizer the moments of `state_tensors` after `step` steps. InputError for one that is absent."""
    state = {}
    for index, (name, parameter) in enumerate(named.items() if step else ()):
        state[index] = {"step": torch.tensor(float(step))}
        for key in MOMENTS:
            moment = tensors.get(f"{key}.{name}")
            if moment is None or moment.shape != parameter.shape:
                raise InputError(
                    f"the checkpoint lacks {key}.{name} as {list(parameter.shape)}: it can be sampled from, "
                    "but to go on training copy the whole checkpoint, optimizer.safetensors included"
                )
            state[index][key] = moment.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
