"""95 % intervals: of a mean by Student's t, of a share by Wilson's formula."""

import math

import numpy as np

# Student's t: 95 % lies within so many standard errors, for 1 to 30 degrees of freedom.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Z95 = 1.959964  # a normal variable lies within so many standard deviations 95 % of the time


def of_mean(values: np.ndarray) -> float | None:
    """Half of the interval of the mean of independent values; None for fewer than two."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    # Above the table, the first two terms of t's expansion around the normal: right to four digits.
    t = T95[freedom - 1] if freedom <= 30 else Z95 + (Z95**3 + Z95) / (4 * freedom) + 2.82 / freedom**2
    return t * float(values.std(ddof=1)) / math.sqrt(len(values))


def of_share(count: int, of: int) -> tuple[float, float]:
    """The interval of a share, count / of: it stays within 0 to 1, unlike the usual one."""
    share, spread = count / of, Z95 * Z95 / of
    middle = (share + spread / 2) / (1 + spread)
    reach = Z95 * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    # In exact arithmetic both bounds keep to their side of the share, and within 0 to 1.
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))
