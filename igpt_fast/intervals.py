"""95 % intervals: of a mean by Student's t, of a share by Wilson's formula; of images in groups by whole groups.

Images of one group, such as a patient's, are alike: they say less than as many of different groups. The error of a mean
is then taken from the groups' sums, as surveys take it from clusters, and a share counts as one of so many independent
images as would have this error (Korn and Graubard, 1998, with Wilson's formula in place of the exact one).

A large group draws the mean towards itself, and so hides part of its own error: its sum counts for as much more (Bell
and McCaffrey, 2002), and groups of unequal sizes for as few as equal ones that would average as well (Kish, 1965).
Without both, intervals of ten patients with one to dozens of slices each hold the truth 84 times in 100.
"""

import math

import numpy as np

# Student's t: 95 % lies within so many standard errors, for 1 to 30 degrees of freedom.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Z95 = 1.959964  # a normal variable lies within so many standard deviations 95 % of the time


def margin_of_mean(values: np.ndarray, groups: np.ndarray | None = None) -> float | None:
    """The margin of error of the mean of values [N], half the interval's width; None for fewer than two groups.

    groups: int [N], the group of each value; None: all are independent.
    """
    variance, freedom = _of_the_mean(values, groups)
    return _t95(freedom) * math.sqrt(variance) if freedom else None


def of_share(right: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The interval of the share of `right`, bool [N]: it stays within 0 to 1, unlike the usual one.

    groups: int [N], the group of each image; None: all are independent. Of one group nothing follows: (0, 1).
    """
    share, of = float(right.mean()), float(len(right))
    if groups is not None:
        variance, freedom = _of_the_mean(right, groups)
        if not freedom:
            return 0.0, 1.0
        independent = share * (1 - share) / of
        if not independent:  # all right or all wrong: nothing shows how alike a group's images are, so it counts as one
            of = 1 + freedom
        elif variance > independent:
            of *= independent / variance
        of *= (Z95 / _t95(freedom)) ** 2
    spread = Z95 * Z95 / of
    middle = (share + spread / 2) / (1 + spread)
    reach = Z95 * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    # In exact arithmetic both bounds keep to their side of the share, and within 0 to 1.
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


def _of_the_mean(values: np.ndarray, groups: np.ndarray | None) -> tuple[float, float]:
    """The variance of the mean, and its degrees of freedom; 0 and 0 of one group."""
    of = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    sums, parts = np.bincount(of, values - values.mean()), np.bincount(of) / len(values)
    if len(parts) < 2:
        return 0.0, 0.0
    number = 1 / float((parts * parts).sum())  # of equal groups whose mean would vary as much
    return float((sums * sums / (1 - parts)).sum()) / len(values) ** 2, max(1.0, number - 1)


def _t95(freedom: float) -> float:
    if freedom <= len(T95):  # a little too much between whole numbers
        return float(np.interp(1 / freedom, 1 / np.arange(len(T95), 0, -1), T95[::-1]))
    # Above the table, the first two terms of t's expansion around the normal: right to four digits.
    return Z95 + (Z95**3 + Z95) / (4 * freedom) + 2.82 / freedom**2
