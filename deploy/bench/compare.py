"""Training steps of ours beside PyTorch's on the same two cores, in turn, as ratios of one run on one machine.

    python compare.py target/release/lockstep [--shapes tiny small gpt2s] [--pairs 5] [--steps 20]

Needs PyTorch. Each pair runs two workers of one thread each (`lockstep bench compute`), then PyTorch in its layouts (see
torch_step.py). Prints a row of a Markdown table for each shape: medians over the pairs, and the median of the pairs'
ratios. "better" is the faster of `single` and `ddp` in that pair.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LAYOUTS = ["single", "ddp", "alone"]


def result_of(command: Sequence[str]) -> dict[str, Any]:
    """What a command prints, as JSON."""
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def machine() -> str:
    """The processor's name, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lockstep")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "small", "gpt2s"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    peer = Path(__file__).with_name("torch_step.py")

    print(f"{machine()}; PyTorch {torch.__version__}; {args.pairs} pairs of {args.steps} steps\n")
    print("| shape | ours, 2 × 1 thread | PyTorch 1 × all | DDP gloo, 2 × 1 | PyTorch alone, 2 × 1 | ours ÷ better | ours ÷ DDP "
          "| ours ÷ alone | products | peak MB, ours | PyTorch |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for shape in args.shapes:
        pairs = []
        for number in range(args.pairs):
            print(f"{shape}: pair {number + 1} of {args.pairs}", file=sys.stderr, flush=True)
            ours = [args.lockstep, "bench", "compute", "--shape", shape, "--device", "cpu", "--workers", "2", "--threads", "1"]
            pair = {"ours": result_of([*ours, "--steps", str(args.steps), "--json"])}
            for layout in LAYOUTS:
                theirs = [sys.executable, str(peer), "--shape", shape, "--layout", layout, "--steps", str(args.steps)]
                pair[layout] = result_of(theirs)
            pairs.append(pair)

        def rate(pair: dict[str, Any], name: str) -> float:
            if name == "better":
                return max(rate(pair, "single"), rate(pair, "ddp"))
            return pair[name]["tokens_per_sec"]

        rates = [f"{statistics.median(rate(pair, name) for pair in pairs):,.0f}" for name in ["ours", *LAYOUTS]]
        ratios = [
            f"{statistics.median(rate(pair, 'ours') / rate(pair, name) for pair in pairs):.2f}"
            for name in ["better", "ddp", "alone"]
        ]
        products = f"{statistics.median(pair['ours']['matmul_share'] for pair in pairs):.0%}"
        peaks = [f"{max(pair[name]['peak_rss_bytes'] for pair in pairs) / 1e6:,.0f}" for name in ["ours", "alone"]]
        print("| " + " | ".join([shape, *rates, *ratios, products, *peaks]) + " |", flush=True)


if __name__ == "__main__":
    main()
