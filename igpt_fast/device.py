"""Where to compute."""

import torch

from igpt_fast.errors import InputError


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto": the GPU when there is one, else the CPU; else what is named. InputError when this machine lacks it."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used here ({reason}): use cpu") from error
    if torch.device(device).type not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r} is none to train or sample on: use cpu or cuda")
    return torch.device(device)
