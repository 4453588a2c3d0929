"""The only copy of each codebook, in float32, and of the thresholds between its codes.

NF4: quantiles of the normal distribution (QLoRA, arXiv:2305.14314, appendix E). NF3: the same construction with 3 bits. FP4:
sign, two exponent bits, one mantissa bit, scaled to a maximum of 1; bit 3 of the code is the sign. E2M1: the OCP float of the same
bits, whose values are not scaled. Dynamic map: the 8-bit signed dynamic exponent type (arXiv:1511.04561,
section 1.2) in which double quantization stores absmax.

Thresholds ascend. The number of thresholds below a value is the rank of its code, in the order of the codes' values. A value
exactly on a threshold therefore takes the lower code.
"""

import numpy as np

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)

# NormalFloat of b bits: with d = (1/(2 2^b) + 1/(2 (2^b - 1))) / 2, the quantiles of the normal distribution at 2^(b-1) evenly
# spaced probabilities from 1 - d down to, and without, 1/2; 0; and the same of 2^(b-1) - 1 probabilities with a minus sign; all
# over the largest. With b = 4 that is NF4, where d is 1 - 0.9677083.
NF3 = np.array(
    [-1.0, -0.5350227355957031, -0.24693143367767334, 0.0, 0.1833374798297882, 0.38199394941329956, 0.6229857206344604, 1.0],
    dtype=np.float32,
)

_FP4_MAGNITUDES = np.array([0, 1 / 192, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12], dtype=np.float32)
FP4 = np.concatenate([_FP4_MAGNITUDES, 0 - _FP4_MAGNITUDES])  # code 8 is a second +0

_E2M1_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
E2M1 = np.concatenate([_E2M1_MAGNITUDES, -_E2M1_MAGNITUDES])  # code 8 is -0

# What kernels multiply, with magnitudes of at most 1. `int4` names the integers from -8 on, by code + 8. The last two are in
# eighths, and their absmax stands for 8: multiplying by a power of two rounds nothing.
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "e2m1": E2M1 / np.float32(8), "int4": np.arange(-8, 8, dtype=np.float32) / np.float32(8)}
UNITS = {"nf4": 1.0, "fp4": 1.0, "e2m1": 8.0, "int4": 8.0}
ZERO_CODE = {"nf4": 7, "fp4": 0}

NF4_THRESHOLDS = (NF4[:-1] + NF4[1:]) / np.float32(2)
NF3_THRESHOLDS = (NF3[:-1] + NF3[1:]) / np.float32(2)
# For kernels that search among 15 thresholds: the last of 16 values is repeated, above thresholds that nothing passes.
NF3_OF_SIXTEEN = np.append(NF3_THRESHOLDS, np.full(8, np.inf, np.float32)), np.append(NF3, np.ones(8, np.float32))
# For magnitudes, with the literals of bitsandbytes' CUDA kernel: 0.583333 differs from the midpoint by 3.6e-7.
FP4_THRESHOLDS = np.array([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], dtype=np.float32)


def _fp4_thresholds() -> np.ndarray:
    """The rule of bitsandbytes' kernel, |v| > t and then the sign of v, as one ascending list. A value exactly on -t takes the
    smaller magnitude. Only values below zero get the sign bit."""
    below = np.append(-FP4_THRESHOLDS[::-1], np.float32(0))
    return np.concatenate([np.nextafter(below, np.float32(-np.inf)), FP4_THRESHOLDS])


def _fp4_order() -> np.ndarray:
    ascending = np.argsort(_FP4_MAGNITUDES, kind="stable")
    return np.concatenate([ascending[::-1] + 8, ascending]).astype(np.uint8)


# The 15 thresholds for v = x / absmax, and the 16 codes in ascending order of their values.
THRESHOLDS = {"nf4": NF4_THRESHOLDS, "fp4": _fp4_thresholds()}
ORDER = {"nf4": np.arange(16, dtype=np.uint8), "fp4": _fp4_order()}


def _dynamic_map() -> np.ndarray:
    values = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        edges = _linspace(np.float32(0.1), np.float32(1), 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * middles
        values += [*scaled, *-scaled]
    return np.sort(np.array(values, dtype=np.float32))


def _linspace(start: np.float32, end: np.float32, count: int) -> np.ndarray:
    """Computes what torch.linspace computes, because the map is defined by its rounding: from both ends, a float32 step, fused
    multiply-add (which float64 gives exactly here)."""
    step = np.float64((end - start) / np.float32(count - 1))
    i = np.arange(count, dtype=np.float64)
    return np.where(i < count // 2, start + step * i, end - step * (count - 1 - i)).astype(np.float32)


def _dynamic_thresholds() -> np.ndarray:
    """Midpoints, rounded down to float32. No float32 is between a midpoint and its rounded value, so comparisons do not change."""
    exact = (DYNAMIC_MAP[:-1].astype(np.float64) + DYNAMIC_MAP[1:].astype(np.float64)) / 2
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _dynamic_lines() -> np.ndarray:
    """See DYNAMIC_LINES."""
    positive, lines = DYNAMIC_MAP[127:].astype(np.float64), np.zeros((2, 16))
    for e in range(8):
        first, last = positive[2**e], positive[min(2 ** (e + 1), len(positive)) - 1]
        slope = (last - first) / max(2**e - 1, 1) if e < 7 else 0.0
        lines[:, e + 1] = first - slope * 2**e, slope / 4
    return lines.astype(np.float32)


DYNAMIC_MAP = _dynamic_map()
DYNAMIC_THRESHOLDS = _dynamic_thresholds()
# The map as lines: starts and slopes, [2, 16]. Entry 127 is 0. The p-th entries on both sides of it, for p from 2^e up to
# 2^(e+1), are +-(start + slope 4 p), with the start and the slope at e + 1: the low four bits of the exponent of 4 p in float32.
DYNAMIC_LINES = _dynamic_lines()


def _e8m0() -> np.ndarray:
    """Powers of two from 2^-127 to 2^127; the last code is NaN."""
    values = np.exp2(np.arange(256, dtype=np.float64) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


def _e4m3() -> np.ndarray:
    """The values of E4M3 by their bits: sign, four exponent bits with bias 7, three bits of mantissa; 0x7f and 0xff are NaN."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    magnitudes = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(np.float64) - 10))
    magnitudes[127] = np.nan
    return np.concatenate([magnitudes, -magnitudes]).astype(np.float32)


# The values of 8-bit scales, by their bits.
E8M0, E4M3 = _e8m0(), _e4m3()
