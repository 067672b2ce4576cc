"""What every op means, in plain torch. Slow on purpose; every backend is held against this."""

from igpt_fast.reference import (
    activation,
    attention,
    attention_decode,
    attention_dropout,
    cross_entropy,
    decode_step,
    dropout,
    linear,
    linear_cross_entropy,
    norm,
    palette,
    sampling,
)

__all__ = [
    "activation",
    "attention",
    "attention_decode",
    "attention_dropout",
    "cross_entropy",
    "decode_step",
    "dropout",
    "linear",
    "linear_cross_entropy",
    "norm",
    "palette",
    "sampling",
]
