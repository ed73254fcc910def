"""Ours beside PyTorch on the same two cores, in turn, as ratios of one run on one machine: training steps, or generation.

    python compare.py target/release/lockstep [compute|cluster|generate] [--shapes tiny small gpt2s] [--pairs 5] [--steps 20]

Needs PyTorch. Each pair runs two workers of one thread each (`lockstep bench compute`, without exchange and optimizer; or
`bench cluster`, with both), then PyTorch in its layouts (see torch_step.py). Prints a row of a Markdown table for each
shape: medians over the pairs, and the median of the pairs' ratios. "better" is the faster of `single` and `ddp` in that
pair. Generation (`lockstep bench generate`, torch_generate.py) is one process with two threads each, and `--steps` is how often a
pair repeats it.
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

def result_of(command: Sequence[str]) -> dict[str, Any]:
    """What a command prints, as JSON."""
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def machine() -> str:
    """The processor's name, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def rate(pair: dict[str, Any], name: str) -> float:
    """Tokens a second."""
    if name == "better":
        return max(rate(pair, "single"), rate(pair, "ddp"))
    return pair[name]["tokens_per_sec"]


def row_of(measure: str, pairs: Sequence[dict[str, Any]]) -> list[str]:
    """What a table says of a shape."""
    layouts = [layout for layout in ["ours", "single", "ddp", "alone"] if layout in pairs[0]]
    rates = [f"{statistics.median(rate(pair, layout) for pair in pairs):,.0f}" for layout in layouts]
    others = ["better", *layouts[2:]]
    ratios = [f"{statistics.median(rate(pair, 'ours') / rate(pair, other) for pair in pairs):.2f}" for other in others]
    peaks = [f"{max(pair[name]['peak_rss_bytes'] for pair in pairs) / 1e6:,.0f}" for name in ["ours", layouts[-1]]]
    share = "matmul_share" if measure == "compute" else "overhead_ratio"
    return [*rates, *ratios, f"{statistics.median(pair['ours'][share] for pair in pairs):.1%}", *peaks]


GENERATED = {"prefill": "prefill_tokens_per_sec", "one": "decode_tokens_per_sec", "eight": "batch_tokens_per_sec"}


def row_of_generation(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """What a table says of a shape that generates."""
    row = []
    for key in GENERATED.values():
        ours, theirs = ([pair[name][key] for pair in pairs] for name in ["ours", "single"])
        ratio = statistics.median(our / their for our, their in zip(ours, theirs, strict=True))
        row += [f"{statistics.median(ours):,.0f}", f"{statistics.median(theirs):,.0f}", f"{ratio:.2f}"]
    limit = statistics.median(pair["ours"]["memory_limit_tokens_per_sec"] for pair in pairs)
    return [*row, f"{limit:,.0f}"]


HEADS = {
    "compute": ["ours, 2 × 1 thread", "PyTorch 1 × all", "DDP gloo, 2 × 1", "PyTorch alone, 2 × 1", "ours ÷ better",
                "ours ÷ DDP", "ours ÷ alone", "products", "peak MB of a worker", "of PyTorch alone"],
    "cluster": ["ours, 2 × 1 thread", "PyTorch 1 × all", "DDP gloo, 2 × 1", "ours ÷ better", "ours ÷ DDP", "overhead",
                "peak MB of the coordinator", "of a DDP process"],
    "generate": [f"{what}{of}" for what in GENERATED for of in [", ours", ", PyTorch", ": ours ÷ PyTorch"]]
                + ["one, if weights were read alone"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lockstep")
    parser.add_argument("measure", nargs="?", choices=HEADS, default="compute")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "small", "gpt2s"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    generates = args.measure == "generate"
    peer = Path(__file__).with_name("torch_generate.py" if generates else "torch_step.py")
    layouts = {"compute": ["single", "ddp", "alone"], "cluster": ["single", "ddp"], "generate": ["single"]}[args.measure]
    steps = "--repetitions" if generates else "--steps"

    print(f"{machine()}; PyTorch {torch.__version__}; {args.pairs} pairs of {args.steps} {steps[2:]}\n")
    heads = ["shape", *HEADS[args.measure]]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for shape in args.shapes:
        pairs = []
        for number in range(args.pairs):
            print(f"{shape}: pair {number + 1} of {args.pairs}", file=sys.stderr, flush=True)
            of_all = ["--shape", shape, steps, str(args.steps)]
            layout_of_ours = ["--threads", "2"] if generates else ["--workers", "2", "--threads", "1"]
            ours = [args.lockstep, "bench", args.measure, *of_all, "--device", "cpu", *layout_of_ours]
            pair = {"ours": result_of([*ours, "--json"])}
            for layout in layouts:
                pair[layout] = result_of([sys.executable, str(peer), *of_all, *([] if generates else ["--layout", layout])])
            pairs.append(pair)
        row = row_of_generation(pairs) if generates else row_of(args.measure, pairs)
        print(f"| {' | '.join([shape, *row])} |", flush=True)


if __name__ == "__main__":
    main()
