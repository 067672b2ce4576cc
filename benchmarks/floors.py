"""How long a call takes at the least on a device whose limits are known: by its products, or by its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a device reaches at best: FLOP/s of 16-bit products on its tensor cores, bytes/s of a copy."""

    products: float
    memory: float


# By the name that torch gives a device. H200: 790 TFLOP/s is what cuBLAS reaches at 8192³ (769 to 798), and 4.3 TB/s
# what a copy of 2 GiB does, read and written bytes together (4.27 to 4.29 measured).
KNOWN = {"NVIDIA H200": Limits(790e12, 4.3e12)}


def floor(work: Mapping[str, float], device: str | None) -> tuple[float, str] | None:
    """(seconds, "products" or "memory") that no kernel can beat; None where the device's limits are not known.

    work: amounts per call as a Case has them, in FLOP of 16-bit products ("GFLOP/s") and bytes ("GB/s")
    """
    limits = KNOWN.get(device or "")
    if limits is None:
        return None
    return max(
        (work.get("GFLOP/s", 0.0) / limits.products, "products"), (work.get("GB/s", 0.0) / limits.memory, "memory")
    )
