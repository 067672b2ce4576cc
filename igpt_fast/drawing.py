"""The pixels of images, drawn one by one."""

from collections.abc import Iterator

import torch
from torch import Tensor

from igpt_fast import ops
from igpt_fast.cached import Decoder, decode_one_token
from igpt_fast.replay import Replayed

Options = tuple[float, int | None, float | None]  # temperature, top_k, top_p


def draw(decoder: Decoder, logits: Tensor, images: Tensor, uniforms: Tensor, options: Options) -> Iterator[int]:
    """Fills in the pixels behind those that the decoder's cache knows; says after each how many are known.

    logits [N, colors] of the first pixel to draw   images int64 [N, T]   uniforms float64 [T, N]: pixel t's in row t
    A row of logits that are not finite leaves -1.
    """
    first, last = decoder.cache.length - 1, images.shape[1] - 1
    if images.device.type != "cuda":
        for at in range(first, last + 1):
            images[:, at] = token = ops.sample_tokens(logits, uniforms[at], *options)
            if at < last:
                logits = decode_one_token(decoder, token.clamp(min=0))
            yield at + 1
        return
    steps = CountedSteps(decoder, logits, images, uniforms, options)
    step = Replayed(steps.step, images.device)
    for at in range(first, last):
        step()
        decoder.cache.length += 1
        yield at + 1
    steps.draw()
    yield last + 1


class CountedSteps:
    """Steps that differ in nothing that the host knows: where they are is counted on the device."""

    def __init__(self, decoder: Decoder, logits: Tensor, images: Tensor, uniforms: Tensor, options: Options) -> None:
        self.decoder, self.logits, self.images = decoder, logits.clone(), images
        self.uniforms, self.options = uniforms, options
        self.at = torch.full((1,), decoder.cache.length - 1, device=images.device)  # the pixel to draw

    def draw(self) -> Tensor:
        """One pixel of each image → int64 [N]"""
        token = ops.sample_tokens(self.logits, self.uniforms.index_select(0, self.at)[0], *self.options)
        self.images.index_copy_(1, self.at, token.unsqueeze(1))
        return token

    def step(self) -> None:
        """One pixel of each image, and the logits of the next."""
        pixel = self.draw().clamp(min=0)
        self.at += 1  # slot t of the cache has pixel t - 1
        self.logits.copy_(self.decoder.step(pixel, self.at))
