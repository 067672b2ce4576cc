"""What a model finds in many images, batch by batch: the loop of likelihoods, features and classes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from igpt_fast.console import progress
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens
from igpt_fast.tokens import TokenDataset


def over_images(
    of: Callable[[Tensor], Tensor],
    found: np.ndarray,
    dataset: TokenDataset | JoinedTokens,
    indices: np.ndarray,
    batch: int,
    device: torch.device,
    amp: bool,
    doing: str,
    what: str,
) -> None:
    """Fills `found`, [N, …], with of(tokens) of the N images `indices`, in inference mode; progress is on stderr.

    of: from tokens, int64 [n, H, W] on `device`, to [n, …]. batch: images side by side. amp: bf16 autocast. doing: for
    the bar, as "scoring". what: for errors, as "likelihoods". Raises InputError for a batch below 1, and where not all
    that was found is finite.
    """
    if batch < 1:
        raise InputError(f"batch is {batch}; use at least 1")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    with torch.inference_mode(), autocast, progress(len(indices), "images", doing) as bar:
        for start in range(0, len(indices), batch):
            tokens = dataset.batch(indices[start : start + batch]).to(device)
            found[start : start + batch] = of(tokens).cpu().numpy()
            bar.advance(len(tokens))
    if not np.isfinite(found).all():
        raise InputError(
            f"the model's {what} are not finite: its weights are broken or overflow in this dtype; use another "
            "checkpoint or float32"
        )
