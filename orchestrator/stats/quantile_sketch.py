"""Buckets of the quantile sketch: which one a float belongs to, and which float stands for one.

Counts in buckets add exactly, so a sketch merges without any error of its own.
"""

from __future__ import annotations

import math

from orchestrator.stats.exact import ONE, UNIT_SHIFT

__all__ = ["bucket", "representative"]


def bucket(value: float, sketch_bits: int) -> int:
    """The bucket of a finite value: 0 for 0, else its sign, binary exponent and first mantissa bits as one number.

    Buckets ascend with their values. Subnormals are normalised first, so they are told apart as well as other numbers.
    No logarithm is taken, unlike in DDSketch (Masson, Rim and Lee 2019): its last bits differ between libraries.
    """
    mantissa, exponent = math.frexp(value)
    leading = int(mantissa * (2 << sketch_bits))
    if not leading:
        return 0
    code = ((exponent + UNIT_SHIFT - 2) << sketch_bits) + abs(leading) + 1
    return code if leading > 0 else -code


def representative(code: int, sketch_bits: int) -> float:
    """The value that stands for a bucket: its middle, rounded towards 0 to a float.

    A bucket spans 2**-sketch_bits of its lower end at most, so the middle is within 2**-(sketch_bits + 1) of each of
    its values.
    """
    if not code:
        return 0.0
    exponent, leading = divmod(abs(code) - 1, 1 << sketch_bits)
    middle = (2 << sketch_bits) + 2 * leading + 1
    # In units of 2**-1074 the lower end is (2**sketch_bits + leading) << exponent >> sketch_bits; the lowest subnormals
    # don't have all of these bits.
    total = middle << exponent >> (sketch_bits + 1)
    return math.copysign(total / ONE, code)
