"""What a model finds in many images, batch by batch: the loop of likelihoods, features and classes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from igpt_fast.batches import digest, fingerprint
from igpt_fast.console import progress
from igpt_fast.device import images_at_once
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens
from igpt_fast.model import ImageGPT
from igpt_fast.processes import Processes
from igpt_fast.tokens import TokenDataset


def over_images(
    of: Callable[[Tensor], Tensor],
    found: np.ndarray,
    model: ImageGPT,
    dataset: TokenDataset | JoinedTokens,
    indices: np.ndarray,
    batch: int | None,
    *,
    more: int = 0,
    processes: Processes | None,
    amp: bool,
    doing: str,
    what: str,
) -> None:
    """Runs `of` on the N images `indices` in batches, in inference mode, and puts what it gives of image i in found[i].

    of: from tokens, int64 [n, H, W] on the model's device, to [n, …], by the model. batch: images side by side; None:
    what fits, see images_at_once, which `more` is for. processes: those that look at a share of the images each; all
    are given what all have found. amp: bf16 autocast. doing: for the bar, as "scoring". what: for errors, as
    "likelihoods". Raises InputError for a batch below 1, for processes with different models or images, and where not
    all that was found is finite.
    """
    if batch is None:
        batch = images_at_once(model.config, more)
    if batch < 1:
        raise InputError(f"batch is {batch}; use at least 1")
    processes, device = processes or Processes(model.wte.device), model.wte.device
    if processes.count > 1:
        sees = {"sight of the model": _glance(model), "choice of images": digest(indices), **fingerprint(dataset)}
        processes.refuse_differences(sees)
    own = slice(processes.rank, None, processes.count)
    mine, rows = indices[own], found[own]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    with torch.inference_mode(), autocast, progress(len(indices), "images", doing) as bar:
        for start in range(0, len(mine), batch):
            tokens = dataset.batch(mine[start : start + batch]).to(device)
            rows[start : start + batch] = of(tokens).cpu().numpy()
            bar.to(min(len(indices), (start + len(tokens)) * processes.count))
        processes.fill(found)
    if not np.isfinite(found).all():
        raise InputError(
            f"the model's {what} are not finite: its weights are broken or overflow in this dtype; use another "
            "checkpoint or float32"
        )


def _glance(model: ImageGPT) -> str:
    """A few letters that tell a model from others, by some numbers of each of its tensors."""
    flat = [parameter.detach().flatten() for parameter in model.parameters()]
    return digest(torch.cat([t[:: max(1, len(t) // 64)].float().cpu() for t in flat]).numpy())
