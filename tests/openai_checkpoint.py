"""Checkpoints as the original code's: their variables, and TensorFlow to write them with.

`python tests/openai_checkpoint.py`, with TensorFlow installed, writes the small one that the tests carry, data/openai/.
"""

import zlib
from pathlib import Path

import numpy as np

PREFIX = Path(__file__).parent / "data" / "openai" / "model.ckpt-131000"
SIZES = {"layers": 2, "width": 8, "heads": 2, "colors": 7, "pixels": 6}  # of the checkpoint that the tests carry
SHARDS = 3


def shapes(layers: int, width: int, heads: int, colors: int, pixels: int) -> dict[str, tuple[int, ...]]:
    """The variables of an autoregressive model, as the published code makes them."""
    d, head = width, (heads, width // heads, width)
    found = {"wpe": (pixels, d), "wte": (colors, d), "wtet": (colors, d), "sos": (d,), "ln_f/g": (d,)}
    for layer in range(layers):
        found |= {f"h{layer}/ln_1/g": (d,), f"h{layer}/ln_2/g": (d,)}
        found |= {f"h{layer}/attn/{name}_proj": head for name in "qkvc"}
        found |= {f"h{layer}/mlp/c_fc/w": (d, 4 * d), f"h{layer}/mlp/c_proj/w": (4 * d, d)}
    return {f"model/{name}": shape for name, shape in found.items()}


def variable(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that depend on the name and the place alone, and that float32 and float16 hold exactly."""
    count = np.arange(1, 1 + np.prod(shape, dtype=np.int64), dtype=np.uint64)
    bits = (count * 2654435761 + zlib.crc32(name.encode())) >> 7
    return ((bits % 2048).astype(np.float32) / 1024 - 1).reshape(shape)


def variables(**sizes: int) -> dict[str, np.ndarray]:
    """The weights of a model, and with them what an optimizer leaves."""
    found = {name: variable(name, shape) for name, shape in shapes(**sizes).items()}
    for slot in ("adam_m", "adam_v"):
        found |= {f"{name}/{slot}": found[name] for name in ("model/wpe", "model/h0/mlp/c_fc/w")}
    return found | {"global_step": np.int64(131000), "model/h1/ln_2/g/AdamWeightDecayOptimizer_1": np.ones(3)}


def write(prefix: Path, found: dict[str, np.ndarray], shards: int) -> None:
    """Writes a tensor bundle of so many data files, by TensorFlow itself."""
    import tensorflow as tf

    parts = [f"{prefix}_temp/part-{k:05d}-of-{shards:05d}" for k in range(shards)]
    for k, part in enumerate(parts):
        names = sorted(found)[k::shards]
        tensors = [tf.constant(found[name]) for name in names]
        tf.raw_ops.SaveV2(prefix=part, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix), delete_old_dirs=True)


if __name__ == "__main__":
    PREFIX.parent.mkdir(parents=True, exist_ok=True)
    write(PREFIX, variables(**SIZES), SHARDS)
