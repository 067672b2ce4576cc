"""What every op means, in plain torch. Slow on purpose; every backend is held against this."""

from igpt_fast.reference import activation, attention, cross_entropy, linear, norm, palette, sampling

__all__ = ["activation", "attention", "cross_entropy", "linear", "norm", "palette", "sampling"]
