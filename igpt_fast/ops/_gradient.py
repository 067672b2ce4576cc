"""An op and its gradient, written once, for eager autograd and as a registered op for torch.compile.

The compiler takes a registered op as it is and never looks inside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from igpt_fast.ops._native import in_plain_torch, say_slower


def differentiable(
    name: str, forward: Callable, fake: Callable, backward: Callable, fake_backward: Callable, setup: Callable,
    gradient: Callable,
) -> Callable[..., Any]:  # fmt: skip
    """Registers igpt::NAME and igpt::NAME_backward → the function that autograd runs where nothing is compiled.

    forward, backward: typed functions that choose their backend themselves and give new tensors alone: what is absent
    is empty. fake, fake_backward: the same, of shapes. setup(ctx, inputs, output): what is kept.
    gradient(ctx, backward, *grads): the gradient of each input, by the backward that it is handed.
    """
    for of, run, like in ((name, forward, fake), (f"{name}_backward", backward, fake_backward)):
        torch.library.custom_op(f"igpt::{of}", run, mutates_args=()).register_fake(like)
    compiled = getattr(torch.ops.igpt, f"{name}_backward")
    torch.library.register_autograd(
        f"igpt::{name}", lambda ctx, *grads: gradient(ctx, compiled, *grads), setup_context=setup
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup(ctx, inputs, output)  # not as a setup_context: torch would inspect a signature at each call
            return output

        @staticmethod
        def backward(ctx, *grads):
            if not (reason := why_plain_gradient(grads)):
                return gradient(ctx, backward, *grads)
            say_slower(f"the gradient of {name} runs on plain torch: {reason}")
            with in_plain_torch():
                return gradient(ctx, backward, *grads)

    return Eager.apply


def why_plain_gradient(grads: Sequence[Tensor | None]) -> str | None:
    """Why plain torch must make the gradients that `grads`, those of the outputs, ask for; None when it need not.

    torch's once_differentiable refuses second derivatives, but only of what depends on `grads`: where these are
    constants, as in a first backward pass, it loses them without a word.
    """
    if torch.is_grad_enabled():
        return "it is to be differentiated again"
    func = torch._C._functorch
    batched = any(g is not None and (func.is_legacy_batchedtensor(g) or func.is_batchedtensor(g)) for g in grads)
    return "many are asked for at once" if batched else None
