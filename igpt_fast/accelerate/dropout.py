"""nn.Dropout on a CPU, where torch's own draws one element after another and costs more than the products around it."""

import torch
from torch import Tensor, nn

from igpt_fast import ops
from igpt_fast.accelerate.plain import plain
from igpt_fast.ops.dropout import has_dropout_kernel


def dropout(module: nn.Module, x: Tensor) -> Tensor:
    """A dropout module's call: by `drawn` where nobody would notice."""
    return drawn(module, x) if plain(module, nn.Dropout) else module(x)


def drawn(self: nn.Module, input: Tensor) -> Tensor:
    """nn.Dropout's forward. It draws a seed from torch's generator, so it keeps other elements than torch's own would.

    On a GPU, where torch's own is fast, and for what has no kernel it is torch's own.
    """
    idle = not self.training or self.p in (0, 1) or torch.compiler.is_compiling()
    if idle or not has_dropout_kernel(input):
        return nn.Dropout.forward(self, input)
    return ops.dropout(input, self.p, int(torch.randint(1 << 62, ())))
