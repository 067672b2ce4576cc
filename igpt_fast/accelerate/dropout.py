"""nn.Dropout on a CPU, where torch's own draws one element after another and costs more than the products around it."""

import torch
from torch import Tensor, nn

from igpt_fast.accelerate.theirs import plain

LEVELS = 1 << 15  # an element is dropped where a 15-bit number is among the p · LEVELS largest
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as a float of so many bytes


def dropout(module: nn.Module, x: Tensor) -> Tensor:
    """What a dropout module makes of x; its draws, from torch's generator, are others than torch's own.

    On a CPU p is taken to the nearest 2^-15. Anything but a plain nn.Dropout is called as it is, and on a GPU all are.
    """
    ours = type(module) is nn.Dropout and plain(module) and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not ours:
        return module(x)
    dropped = round(module.p * LEVELS)
    if not module.training or not dropped:
        return x
    return module(x) if dropped == LEVELS else _Dropout.apply(x, dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropped):
        count = x.numel()
        # Four 16-bit numbers from each draw of the generator: -LEVELS .. -1 once the sign is set. The sum is negative
        # where an element is kept, and its sign, spread over all bits, the mask.
        drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
        mask = drawn.view(torch.int16)[:count].bitwise_or_(-LEVELS).add_(dropped).bitwise_right_shift_(15)
        mask = mask.view(x.shape).to(torch.int8)
        ctx.factor = LEVELS / (LEVELS - dropped)
        ctx.save_for_backward(mask)
        return _masked(x, mask, ctx.factor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _masked(dy, *ctx.saved_tensors, ctx.factor), None


def _masked(x: Tensor, mask: Tensor, factor: float) -> Tensor:
    """x · factor where the mask is -1, 0 where it is 0."""
    bits = BITS[x.element_size()]
    return (x.contiguous().view(bits) & mask.to(bits)).view(x.dtype).mul_(factor)
