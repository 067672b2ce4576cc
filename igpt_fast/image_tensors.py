"""What Python gives a model: images as of vision models, [B, 3, H, W], become tokens; which of these it sees."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.images import resize_image
from igpt_fast.palette import Palette


def tokens_of(
    images: Tensor, palette: Palette | None, config: Config, resize: str | None, device: torch.device
) -> Tensor:
    """Resizes and quantises.   images [B, 3, H, W], uint8 or float in [0, 1] → int64 [B, config.size] on `device`

    Floats are rounded to 8 bits. Images of another size go through `resize_image` on the CPU, as those of files do.
    Raises InputError for another shape or dtype, for floats outside [0, 1], as after a normalisation, and without a
    palette of the config's colours.
    """
    if palette is None or len(palette) != config.colors:
        has = "no palette" if palette is None else f"a palette of {len(palette)}"
        raise InputError(f"the model has {has}; set model.palette to the igpt.Palette of its {config.colors} colours")
    size = config.size
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        shape = list(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise InputError(f"the images are {shape}; give a tensor [B, 3, H, W], uint8 or float in [0, 1]")
    pixels = _bytes(images.detach()).permute(0, 2, 3, 1)
    if tuple(pixels.shape[1:3]) != tuple(size):
        arrays = pixels.contiguous().cpu().numpy()
        done = [resize_image(Image.fromarray(a), size, resize or "paper", f"image {i}") for i, a in enumerate(arrays)]
        whole = np.stack(done) if done else np.empty((0, *size, 3), np.uint8)
        pixels = torch.from_numpy(whole)
    return palette.encode(pixels.to(device).contiguous())


def _bytes(images: Tensor) -> Tensor:
    if images.dtype is torch.uint8:
        return images
    if not images.is_floating_point():
        raise InputError(f"the images are {images.dtype}; give uint8, or float in [0, 1]")
    if images.numel():
        low, high = (float(end) for end in images.aminmax())
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise InputError(f"the images range from {low:.4g} to {high:.4g}; give float in [0, 1], not normalised")
    return (images.float() * 255).round().to(torch.uint8)


def visible(keep: Tensor | None, tokens: Tensor, config: Config) -> Tensor | None:
    """Which of tokens [N, T] a BERT model sees, bool, shaped and placed as they are; None: all. Raises InputError."""
    if keep is None:
        return None
    if config.objective == "ar":
        raise InputError("keep was given to an autoregressive model; only objective='bert' has a mask")
    if keep.dtype != torch.bool or keep.numel() != tokens.numel():
        raise InputError(f"keep is {keep.dtype} {list(keep.shape)}; give bool {list(tokens.shape)}")
    return keep.reshape(tokens.shape).to(tokens.device)
