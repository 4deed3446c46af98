"""Number formats by integer operations, so that every architecture has them, and how values are rounded to them.

A small float's exponent and mantissa, moved to the place of those of a float16, are the value times a power of two,
subnormals too: 2^-14 for E2M1, 2^-8 for E4M3. The conversion to float32 is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

E2M1_UNIT = tl.constexpr(2.0**14)
E4M3_UNIT = tl.constexpr(2.0**8)
MAGIC = tl.constexpr(1.5 * 2.0**23)
"""Added to a float32 below 2^22 and taken away again, it rounds to an integer, ties to even."""


@triton.jit
def e2m1(code):
    """Codes of 4 bits -> float32, in units of E2M1_UNIT."""
    code = code.to(tl.int16)
    return (((code & 8) << 12) | ((code & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e4m3(byte):
    """Bytes -> float32, in units of E4M3_UNIT. A NaN comes out as 480."""
    byte = byte.to(tl.int16)
    return (((byte & 128) << 8) | ((byte & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def binade(value):
    """The power of two of a positive float32's exponent; 0 for subnormals."""
    return (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def logarithm(power):
    """The exponent, int32, of a float32 that is a power of two."""
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def nearest(steps):
    """Round float32 in [0, 2^22) to integers, ties to even."""
    return (steps + MAGIC) - MAGIC


@triton.jit
def stochastic(steps, seed, at):
    """Round float32 to one of the two integers around, so that the mean is the value itself. `at`: int32, a place in
    the stream of Philox numbers that `seed` starts, another for each value."""
    below = tl.floor(steps)
    return below + (tl.rand(seed, at) < steps - below).to(tl.float32)


@triton.jit
def to_e4m3(value):
    """float32 in [2^-9, 448] -> the byte, int32, of the nearest E4M3 number."""
    step = tl.maximum(binade(value), 2.0**-6) * 0.125
    return nearest(tl.div_rn(value, step)).to(tl.int32) + (logarithm(step) + 9) * 8


@triton.jit
def to_half(value, seed, at, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, LARGEST: tl.constexpr):
    """Round float32 stochastically to a float of MANTISSA bits whose smallest normal is LOWEST; what is beyond LARGEST
    becomes it. Still float32."""
    step = tl.maximum(binade(tl.abs(value)), LOWEST) * 2.0**-MANTISSA
    rounded = stochastic(tl.div_rn(value, step), seed, at) * step
    return tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST)
