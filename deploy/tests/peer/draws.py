"""The random numbers of a run, drawn anew: what "Draws" in ARCHITECTURE.md says, in numpy, and nothing of the Rust code."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

INITIALISATION, TRAINING_WINDOWS, VALIDATION_WINDOWS, ADAPTERS = 1, 2, 3, 11
"""Purposes."""

Words = NDArray[np.uint64]
"""Numbers of 32 bits, with room for their products."""

LOW = np.uint64(0xFFFFFFFF)
HIGH = np.uint64(32)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of many counters under one key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p, q = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = q >> HIGH ^ c1 ^ np.uint64(k0), q & LOW, p >> HIGH ^ c3 ^ np.uint64(k1), p & LOW
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


class Draws:
    """The numbers of one purpose under one seed."""

    def __init__(self, seed: int, purpose: int) -> None:
        zero = np.zeros(1, np.uint64)
        a, b, _, _ = philox((zero + np.uint64(purpose), zero, zero, zero), (seed % 2**32, seed >> 32))
        self.key = (int(a[0]), int(b[0]))

    def words(self, high: int, low: Words) -> tuple[Words, Words, Words, Words]:
        """Four words for each draw (high, low)."""
        high_low, high_high = (np.full_like(low, part) for part in (high % 2**32, high >> 32))
        return philox((low & LOW, low >> HIGH, high_low, high_high), self.key)

    def below(self, high: int, low: int, bound: int) -> int:
        """A number from 0 to bound - 1 for the draw (high, low)."""
        a, b, _, _ = self.words(high, np.array([low], np.uint64))
        return (int(a[0]) | int(b[0]) << 32) * bound >> 64

    def uniform(self, high: int, count: int) -> NDArray[np.float64]:
        """Numbers from 0 to below 1: draw (high, n) gives those at 2n and 2n + 1."""
        a, b, c, d = self.words(high, np.arange((count + 1) // 2, dtype=np.uint64))

        def unit(low: Words, high: Words) -> NDArray[np.float64]:
            return ((low | high << HIGH) >> np.uint64(11)).astype(np.float64) * 2.0**-53

        return np.stack([unit(a, b), unit(c, d)], axis=1).reshape(-1)[:count]

    def normal(self, high: int, count: int) -> NDArray[np.float64]:
        """Numbers with mean 0 and variance 1, by Box and Muller: draw (high, n) gives those at 2n and 2n + 1."""
        a, b, c, d = self.words(high, np.arange((count + 1) // 2, dtype=np.uint64))

        def uniform(low: Words, high: Words) -> NDArray[np.float64]:
            return ((low | high << HIGH) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54

        radius, angle = np.sqrt(-2.0 * np.log(uniform(a, b))), 2.0 * math.pi * uniform(c, d)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


def initial_parameters(shapes: Mapping[str, tuple[int, ...]], layers: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """What a Transformer of this layout and so many layers begins with."""
    draws = Draws(seed, INITIALISATION)
    parameters = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            parameters[name] = np.full(shape, 0.0 if name.endswith(".bias") else 1.0, np.float32)
            continue
        to_residual = name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2.0 * layers) if to_residual else 0.02
        parameters[name] = (std * draws.normal(index, math.prod(shape))).astype(np.float32).reshape(shape)
    return parameters


def initial_adapters(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, NDArray[np.float32]]:
    """What adapters of this layout begin with."""
    draws = Draws(seed, ADAPTERS)
    parameters = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if name.endswith(".lora_B.weight"):
            parameters[name] = np.zeros(shape, np.float32)
            continue
        values = (2.0 * draws.uniform(index, math.prod(shape)) - 1.0) * (1.0 / math.sqrt(shape[0]))
        parameters[name] = values.astype(np.float32).reshape(shape)
    return parameters


def training_start(seed: int, step: int, draw: int, starts: int) -> int:
    """Where the window of row `draw` of a step begins, out of `starts` places; a step's rows count on from the last's."""
    return Draws(seed, TRAINING_WINDOWS).below(step, draw, starts)


def validation_start(seed: int, slot: int, row: int, starts: int) -> int:
    """Where the window of a row of a validation slot begins, out of `starts` places."""
    return Draws(seed, VALIDATION_WINDOWS).below(slot, row, starts)
