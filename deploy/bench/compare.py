"""Ours beside PyTorch on the same two cores, in turn, as ratios of one run on one machine: training, exchange or generation.

    python compare.py target/release/lockstep [compute|cluster|wire|generate] [--shapes tiny small gpt2s] [--pairs 5] [--steps 20]

Needs PyTorch. Each pair runs two workers of one thread each (`lockstep bench compute`, without exchange and optimizer; or
`bench cluster`, with both), then PyTorch in its layouts (see torch_step.py). Prints a row of a Markdown table for each
shape: medians over the pairs, and the median of the pairs' ratios. "better" is the faster of `single` and `ddp` in that
pair. The exchange (`lockstep bench wire`, torch_wire.py) is that of vectors between two workers, whose lengths are the
shapes. Generation (`lockstep bench generate`, torch_generate.py) is one process with two threads each, and `--steps` is how
often a pair repeats it. `--precision bf16` sets training in bf16 beside PyTorch's autocast.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
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


def row_of_wire(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """What a table says of a vector's length."""
    ours = [[pair["ours"][rule]["exchange_ms_median"] for pair in pairs] for rule in ["sgd", "adamw"]]
    theirs = [pair["single"]["all_reduce_ms_median"] for pair in pairs]
    ratios = [statistics.median(our / their for our, their in zip(of_rule, theirs, strict=True)) for of_rule in ours]
    memory = [pair["ours"]["peak_rss_bytes"] / (4 * pair["ours"]["floats"]) for pair in pairs]
    medians = [f"{statistics.median(values):,.0f}" for values in [*ours, theirs]]
    return [*medians, *(f"{ratio:.2f}" for ratio in ratios), f"{max(memory):.1f}"]


HEADS = {
    "compute": ["ours, 2 × 1 thread", "PyTorch 1 × all", "DDP gloo, 2 × 1", "PyTorch alone, 2 × 1", "ours ÷ better",
                "ours ÷ DDP", "ours ÷ alone", "products", "peak MB of a worker", "of PyTorch alone"],
    "cluster": ["ours, 2 × 1 thread", "PyTorch 1 × all", "DDP gloo, 2 × 1", "ours ÷ better", "ours ÷ DDP", "overhead",
                "peak MB of the coordinator", "of a DDP process"],
    "wire": ["ours with SGD, ms", "ours with AdamW", "gloo's all-reduce", "SGD ÷ gloo", "AdamW ÷ gloo",
             "coordinator's peak ÷ bytes of the vector"],
    "generate": [f"{what}{of}" for what in GENERATED for of in [", ours", ", PyTorch", ": ours ÷ PyTorch"]]
                + ["one, if weights were read alone"],
}


PEERS = {"wire": "torch_wire.py", "generate": "torch_generate.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lockstep")
    parser.add_argument("measure", nargs="?", choices=HEADS, default="compute")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "small", "gpt2s"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()
    peer = Path(__file__).with_name(PEERS.get(args.measure, "torch_step.py"))
    if args.precision != "f32" and args.measure in PEERS:
        parser.error(f"{args.measure} is measured in f32")
    layouts = {"compute": ["single", "ddp", "alone"], "cluster": ["single", "ddp"]}.get(args.measure, ["single"])
    shape_option = "--floats" if args.measure == "wire" else "--shape"
    steps = "--repetitions" if args.measure == "generate" else "--steps"
    of_ours = {
        "wire": ["--workers", "2"],
        "generate": ["--device", "cpu", "--threads", "2"],
    }.get(args.measure, ["--device", "cpu", "--workers", "2", "--threads", "1"])
    row_of_measure = {"wire": row_of_wire, "generate": row_of_generation}.get(args.measure, partial(row_of, args.measure))

    print(f"{machine()}; PyTorch {torch.__version__}; {args.pairs} pairs of {args.steps} {steps[2:]}\n")
    heads = ["shape", *HEADS[args.measure]]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for shape in args.shapes:
        pairs = []
        for number in range(args.pairs):
            print(f"{shape}: pair {number + 1} of {args.pairs}", file=sys.stderr, flush=True)
            of_all = [shape_option, shape, steps, str(args.steps)]
            of_all += [] if args.measure in PEERS else ["--precision", args.precision]
            pair = {"ours": result_of([args.lockstep, "bench", args.measure, *of_all, *of_ours, "--json"])}
            for layout in layouts:
                of_layout = [] if args.measure in PEERS else ["--layout", layout]
                pair[layout] = result_of([sys.executable, str(peer), *of_all, *of_layout])
            pairs.append(pair)
        print(f"| {' | '.join([shape, *row_of_measure(pairs)])} |", flush=True)


if __name__ == "__main__":
    main()
