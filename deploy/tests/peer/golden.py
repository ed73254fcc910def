"""What the golden files have in common: values by a formula that any language reproduces, and compact JSON."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
"""Where the files lie that tests compare with."""

PROBE_SCALE = 0.1
"""Scale of the probe's parameters in proto/lockstep.proto (`Invitation.probe`)."""


def hashed(index: int, scale: float) -> float:
    """`((index * 2654435761 mod 2^32) / 2^32 - 0.5) * scale`: evenly spread over [-scale / 2, scale / 2).

    Round it once, to f32, where it becomes a parameter or a gradient.
    """
    return ((index * 2654435761 % 2**32) / 2**32 - 0.5) * scale


def significant(values: Iterable[float], digits: int) -> list[float]:
    """The values rounded to so many significant decimal digits; 9 give an f32 back exactly."""
    return [float(f"{value:.{digits}g}") for value in values]


def write(name: str, document: dict[str, Any]) -> None:
    """Writes a golden file, with each list of numbers on one line, and says how large it is."""
    text = json.dumps(document, indent=1)
    text = re.sub(r"\[\s+([-+.,\deE\s]+?)\s+\]", lambda match: "[" + " ".join(match[1].split()) + "]", text)
    path = GOLDEN / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")
