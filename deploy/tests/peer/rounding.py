"""Vectors in fewer bytes: what GradientFormat and PullRequest of proto/lockstep.proto say, and "Draws" in ARCHITECTURE.md,
in plain Python, and nothing of the Rust code."""

import math
import struct
from dataclasses import dataclass

F32, BF16, INT8 = 0, 1, 2
"""Values of GradientFormat."""

PURPOSE = 14
BLOCK = 256
NAN = 0x7FC00000

Key = tuple[int, int]
Words = tuple[int, int, int, int]


def f32(value: float) -> float:
    """The nearest f32."""
    try:
        return float(*struct.unpack("<f", struct.pack("<f", value)))
    except OverflowError:
        return math.copysign(math.inf, value)


def bits_of(value: float) -> int:
    """The bits of an f32 as a number."""
    return int(*struct.unpack("<I", struct.pack("<f", value)))


def of_bits(bits: int) -> float:
    """The f32 of these bits."""
    return float(*struct.unpack("<f", struct.pack("<I", bits)))


def philox(c0: int, c1: int, c2: int, c3: int, key: Key) -> Words:
    """Philox4x32-10 of one counter."""
    k0, k1 = key
    for _ in range(10):
        p, q = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = q >> 32 ^ c1 ^ k0, q & 0xFFFFFFFF, p >> 32 ^ c3 ^ k1, p & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def draw(high: int, low: int, key: Key) -> Words:
    """Draw (high, low) of a purpose with this key."""
    return philox(low % 2**32, low >> 32, high % 2**32, high >> 32, key)


@dataclass(frozen=True)
class Rounding:
    """What the gradients of one step are rounded by."""

    format: int
    seed: int
    step: int

    def bits(self, level: int, index: int, count: int) -> list[int]:
        """16 random bits for each element of a node's gradient."""
        purpose = philox(PURPOSE, 0, 0, 0, (self.seed % 2**32, self.seed >> 32))[:2]
        key = draw(self.step, level * 2**32 + index, purpose)[:2]
        words = (word for n in range((count + 7) // 8) for word in draw(0, n, key))
        return [half for word in words for half in (word & 0xFFFF, word >> 16)][:count]

    def round(self, level: int, index: int, vector: list[float]) -> list[float]:
        """A node's gradient, rounded."""
        bits = self.bits(level, index, len(vector))
        if self.format == BF16:
            return [to_bf16(value, r) for value, r in zip(vector, bits, strict=True)]
        if self.format == INT8:
            blocks = range(0, len(vector), BLOCK)
            return [value for at in blocks for value in to_int8(vector[at : at + BLOCK], bits[at : at + BLOCK])]
        return vector

    def encode(self, vector: list[float]) -> bytes:
        """A rounded gradient as it travels."""
        if self.format == BF16:
            return b"".join(struct.pack("<H", bits_of(value) >> 16) for value in vector)
        if self.format == INT8:
            return b"".join(int8_bytes(vector[at : at + BLOCK]) for at in range(0, len(vector), BLOCK))
        return struct.pack(f"<{len(vector)}f", *vector)


def to_bf16(value: float, r: int) -> float:
    """One of the two bf16 next to a number."""
    if math.isnan(value):
        return of_bits(NAN)
    bits = bits_of(value)
    rounded = of_bits((bits + r) % 2**32 & 0xFFFF0000)
    return rounded if math.isfinite(rounded) else of_bits(bits & 0xFFFF0000)


def exponent(block: list[float]) -> int | None:
    """k, where a block's scale is 2^k; None where its elements are NaN."""
    if not all(math.isfinite(value) for value in block):
        return None
    most = max(abs(value) for value in block)
    return next((k for k in range(-110, 121) if most <= 127 * 2.0**k), 121)


def to_int8(block: list[float], bits: list[int]) -> list[float]:
    """A block's elements as whole multiples of its scale."""
    k = exponent(block)
    if k is None:
        return [of_bits(NAN)] * len(block)

    def whole(value: float, r: int) -> int:
        t = f32(value * 2.0 ** (16 - k))
        f = math.trunc(f32(t + math.copysign(0.5, t)))
        return min(max((f + r) >> 16, -127), 127)

    return [f32(whole(value, r) * 2.0**k) for value, r in zip(block, bits, strict=True)]


def int8_bytes(block: list[float]) -> bytes:
    """A rounded block as it travels."""
    k = exponent(block)
    if k is None:
        return bytes([255] + [0] * len(block))
    return bytes([k + 127]) + struct.pack(f"<{len(block)}b", *(int(value / 2.0**k) for value in block))


def add_difference(held: list[float], differences: bytes) -> list[float]:
    """A version of the parameters, from the one before."""
    numbers = struct.unpack(f"<{len(held)}H", differences)
    return [f32(value + of_bits(bits << 16)) for value, bits in zip(held, numbers, strict=True)]
