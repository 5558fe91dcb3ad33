"""Real numbers as integers with one scale per tensor, and the bits that a sum of products can need."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parties.errors import LocalError


def quantise(values: NDArray[np.float64], fraction_bits: int, *, bound_bits: int, what: str) -> NDArray[np.int64]:
    """Round v * 2^fraction_bits half to even, and refuse a magnitude of 2^bound_bits or more: overflow is silent."""
    if not 0 < bound_bits <= 62:
        raise LocalError(f"{what}: a bound of {bound_bits} bits does not fit 64-bit integers; choose 1 to 62")
    broken = int(np.count_nonzero(~np.isfinite(values)))
    if broken:
        raise LocalError(f"{what}: {broken} of {values.size} values are NaN or infinite; fill or drop them")
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which the bound refuses
        scaled = np.rint(np.ldexp(np.asarray(values, np.float64), fraction_bits))
    large = int(np.count_nonzero(np.abs(scaled) >= 2.0**bound_bits))
    if large:
        raise LocalError(
            f"{what}: {large} of {values.size} values reach the bound of 2^{bound_bits - fraction_bits}; "
            "rescale them, or agree on fewer fraction bits or a larger bound"
        )
    return scaled.astype(np.int64)


def restore(ints: ArrayLike, fraction_bits: int) -> NDArray[np.float64]:
    """The float64 nearest to each v / 2^fraction_bits, for 64-bit or Python integers of any size; keeps the shape."""
    exact: NDArray[Any] = np.asarray(ints, dtype=object)  # int / int is correctly rounded, at any size
    scale = 1 << fraction_bits
    return np.array([int(v) / scale for v in exact.flat], dtype=np.float64).reshape(exact.shape)


def sum_bits(absolute_sum: int, factor_bound: int) -> int:
    """ceil(log2(worst)) for worst = sum_i |x_i| * max |r_i|, which no |sum_i x_i * r_i| exceeds: exact, no estimate."""
    return max(absolute_sum * factor_bound - 1, 0).bit_length()
