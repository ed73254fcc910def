"""A run of ours beside the same run by PyTorch: the same initial weights, the same windows, step by step.

    python torch_curve.py RUN --svg curve.svg

RUN is the directory of a run over one prepared corpus, in random order and without dropout. Its recipe is read, its
corpus, and its losses to compare with; weights and windows are drawn anew (draws.py), the model is models.py's, the
optimizer and the schedule are PyTorch's own, all in f32 unless --f64 is given. Where the run trains adapters, its base is
read, too, and adapters.py adds them to it.

Exits with 1 where a loss is off by more than 1e-3 in the first 50 steps or 5e-3 later.

Training amplifies roundings, the more so the larger model and learning rate are. How much is due to that, PyTorch shows
against itself, with another number of threads, and so other roundings:

    python torch_curve.py RUN --threads 1 --write one-thread.jsonl
    python torch_curve.py RUN --threads 2 --metrics one-thread.jsonl

Whose roundings are the smaller, a run in f64 shows that both are compared with:

    python torch_curve.py RUN --f64 --write exact.jsonl
    python torch_curve.py RUN --metrics exact.jsonl
"""

import argparse
import json
import math
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import draws
from adapters import Adapters
from models import ModelConfig, config_of
from torch_optim import Case, Muon, Schedule, optimizers_of

EARLY_STEPS = 50
EARLY_TOLERANCE, TOLERANCE = 1e-3, 5e-3
"""Largest differences of a loss, in nats: up to step EARLY_STEPS, and later."""


@dataclass(frozen=True)
class Run:
    """What is read of a run's directory."""

    recipe: dict[str, Any]
    directory: Path
    losses: dict[int, float]
    """Training loss by step, from 1."""
    val_losses: dict[int, float]
    """Validation loss by version, from 0."""
    corpus: Path

    @classmethod
    def open(cls, directory: Path, metrics: Path) -> "Run":
        """Reads recipe.toml, and the losses in `metrics`."""
        recipe = tomllib.loads((directory / "recipe.toml").read_text(encoding="utf-8"))
        inputs = recipe["data"]["input"]
        corpora = [Path(path) for path in ([inputs] if isinstance(inputs, str) else inputs)]
        if len(corpora) != 1 or not (corpora[0] / "manifest.json").exists():
            sys.exit(f"{directory}: its data.input must be one corpus written by `lockstep prepare`, not {inputs}")
        if recipe["data"]["order"] != "random" or recipe["model"]["dropout"] != 0.0:
            sys.exit(f"{directory}: only runs in random order and without dropout can be repeated here")
        if recipe.get("init") and not recipe["adapters"]["rank"]:
            sys.exit(f"{directory}: runs that begin with parameters of another model cannot be repeated here")
        if recipe["data"].get("separate_documents"):
            sys.exit(f"{directory}: runs that keep documents apart cannot be repeated here")
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        val_losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        return cls(recipe, directory, losses, val_losses, corpora[0])

    def model(self, vocab_size: int) -> ModelConfig:
        """The model, with the values that a recipe's zeros stand for."""
        values = self.recipe["model"] | {"vocab_size": vocab_size}
        if values["kind"] == "llama":
            values["kv_heads"] = values["kv_heads"] or values["heads"]
            values["ffn_width"] = values["ffn_width"] or -(-8 * values["width"] // 3 // 32) * 32
        return config_of(values)

    def adapters(self) -> Adapters | None:
        """The adapters that are trained alone, if there are any."""
        checkpoint = max((self.directory / "checkpoints").glob("step-*"))
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        return Adapters(**manifest["adapters"]) if "adapters" in manifest else None

    def base(self) -> dict[str, NDArray[np.float32]]:
        """The parameters that adapters are trained beside, out of a safetensors file: the length of a header, the header, bytes."""
        data = (self.directory / "base" / "model.safetensors").read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        tensors = {name: about for name, about in json.loads(data[8:begin]).items() if name != "__metadata__"}
        return {
            name: np.frombuffer(data[begin:], np.float32, math.prod(about["shape"]), about["data_offsets"][0]).reshape(
                about["shape"]
            )
            for name, about in tensors.items()
        }

    def case(self) -> Case:
        """Optimizer and schedule."""
        rule, plan = dict(self.recipe["optimizer"]), self.recipe["schedule"]
        lr, grad_clip = rule.pop("lr"), rule.pop("grad_clip")
        decay = {"kind": plan["decay"], "steps": plan["decay_steps"] or plan["steps"]}
        schedule = Schedule(plan["steps"], plan["warmup_steps"], decay, plan["min_lr"])
        return Case("run", rule, lr, grad_clip or None, schedule)


def read_tokens(corpus: Path) -> tuple[NDArray[np.uint32], int]:
    """All tokens of a prepared corpus, and the size of their vocabulary."""
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    width = np.uint16 if manifest["vocab_size"] <= 2**16 else np.uint32
    shards = [np.fromfile(corpus / shard["file"], width, offset=1024) for shard in manifest["shards"]]
    return np.concatenate(shards).astype(np.uint32), manifest["vocab_size"]


class Batches:
    """The rows of steps and of validation slots."""

    def __init__(self, recipe: dict[str, Any], tokens: NDArray[np.uint32]) -> None:
        training = int(len(tokens) * recipe["data"]["train_fraction"])
        self.training, self.validation = tokens[:training], tokens[training:]
        self.seed, self.context = recipe["seed"], recipe["model"]["context"]
        self.slots, self.rows = recipe["batch"]["slots"], recipe["batch"]["sequences_per_slot"]
        self.validation_slots = recipe["evaluation"]["slots"]

    def of_step(self, step: int) -> Iterator[Tensor]:
        """For each slot of a step, [rows, context + 1] tokens."""
        starts = len(self.training) - self.context
        for slot in range(self.slots):
            first = ((step - 1) * self.slots + slot) * self.rows
            rows = range(first, first + self.rows)
            yield self._windows(self.training, [draws.training_start(self.seed, step, row, starts) for row in rows])

    def for_validation(self) -> Iterator[Tensor]:
        """The same for each validation slot."""
        starts = len(self.validation) - self.context
        for slot in range(self.validation_slots):
            rows = range(self.rows)
            yield self._windows(self.validation, [draws.validation_start(self.seed, slot, row, starts) for row in rows])

    def _windows(self, tokens: NDArray[np.uint32], starts: Sequence[int]) -> Tensor:
        windows = np.stack([tokens[start : start + self.context + 1] for start in starts])
        return torch.from_numpy(windows.astype(np.int64))


def train(run: Run, steps: int, dtype: torch.dtype, write: Path | None) -> tuple[dict[int, float], dict[int, float]]:
    """Training losses by step and validation losses by version, the latter where the run has them."""
    tokens, vocab_size = read_tokens(run.corpus)
    config, batches = run.model(vocab_size), Batches(run.recipe, tokens)
    adapters, seed = run.adapters(), run.recipe["seed"]
    if adapters:
        initial, base = draws.initial_adapters(adapters.layout(config), seed), run.base()
    else:
        initial, base = draws.initial_parameters(config.layout(), config.layers, seed), {}
    parameters = {name: torch.from_numpy(values).to(dtype).requires_grad_() for name, values in initial.items()}
    frozen = {name: torch.from_numpy(values.copy()).to(dtype) for name, values in base.items()}

    def mean_loss(windows: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens that follow."""
        logits = config.logits(adapters.apply(frozen, parameters) if adapters else parameters, windows[:, :-1])
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    case = run.case()
    optimizers = optimizers_of(case, parameters, Muon)
    schedulers = [case.schedule.scheduler(optimizer, case.lr) for optimizer in optimizers]
    losses: dict[int, float] = {}
    val_losses: dict[int, float] = {}
    lines = write.open("w", encoding="utf-8", buffering=1) if write else None

    @torch.no_grad()
    def validate(version: int) -> None:
        if version in run.val_losses:
            slots = [mean_loss(windows).item() for windows in batches.for_validation()]
            val_losses[version] = sum(slots) / len(slots)
            difference = val_losses[version] - run.val_losses[version]
            print(f"{version:6}  {run.val_losses[version]:.6f}  {val_losses[version]:.6f}  {difference:+.1e}  validation")

    print("  step      ours   PyTorch  difference")
    validate(0)
    started = time.monotonic()
    for step in range(1, steps + 1):
        total = 0.0
        for windows in batches.of_step(step):
            loss = mean_loss(windows) / batches.slots
            loss.backward()
            total += loss.item()
        losses[step] = total
        if lines:
            print(json.dumps({"step": step, "loss": total}), file=lines)
        clip_grad_norm_(parameters.values(), float("inf") if case.grad_clip is None else case.grad_clip)
        for part in [*optimizers, *schedulers]:
            part.step()
        for tensor in parameters.values():
            tensor.grad = None
        if step in (1, 2, 5) or step % 10 == 0 or step == steps:
            left = (time.monotonic() - started) / step * (steps - step)
            difference = total - run.losses[step]
            print(f"{step:6}  {run.losses[step]:.6f}  {total:.6f}  {difference:+.1e}  {left:.0f} s left", flush=True)
        validate(step)
    return losses, val_losses


def draw(path: Path, run: Run, losses: dict[int, float], val_losses: dict[int, float]) -> None:
    """Both curves, and below them how far they are apart."""
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 7), height_ratios=(3, 1))
    steps = list(losses)
    above.plot(steps, [run.losses[step] for step in steps], linewidth=3, alpha=0.4, label="Lockstep")
    above.plot(steps, list(losses.values()), linewidth=1, label="PyTorch")
    if val_losses:
        above.plot(list(val_losses), [run.val_losses[v] for v in val_losses], "o", label="Lockstep, validation")
        above.plot(list(val_losses), list(val_losses.values()), "x", label="PyTorch, validation")
    above.set_ylabel("loss (nats a token)")
    above.set_title(f"{run.recipe['name']}: the same weights and windows")
    above.legend()
    below.semilogy(steps, [max(abs(losses[step] - run.losses[step]), 1e-9) for step in steps], linewidth=1)
    below.plot([1, EARLY_STEPS], [EARLY_TOLERANCE] * 2, "r--", linewidth=1)
    below.plot([EARLY_STEPS, max(steps[-1], EARLY_STEPS)], [TOLERANCE] * 2, "r--", linewidth=1)
    below.set_xlabel("step")
    below.set_ylabel("difference")
    figure.tight_layout()
    figure.savefig(path)
    print(f"{path}: both curves")


def main() -> None:
    """Reads the command line, trains, compares."""
    parser = argparse.ArgumentParser(description="A run of Lockstep's beside the same run by PyTorch.")
    parser.add_argument("run", type=Path, help="directory of a run that has ended")
    parser.add_argument("--steps", type=int, help="compare only so many (default: all of the run's)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--f64", action="store_true", help="let PyTorch compute in f64")
    parser.add_argument("--metrics", type=Path, help="losses to compare with (default: metrics.jsonl of the run)")
    parser.add_argument("--write", type=Path, help="write PyTorch's losses to this file, in the form of metrics.jsonl")
    parser.add_argument("--svg", type=Path, help="draw both curves to this file (needs matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = Run.open(arguments.run, arguments.metrics or arguments.run / "metrics.jsonl")
    steps = min(arguments.steps or len(run.losses), len(run.losses))
    if steps == 0:
        sys.exit(f"{arguments.run}: there is no step in its metrics")
    dtype = torch.float64 if arguments.f64 else torch.float32
    torch.set_default_dtype(dtype)
    losses, val_losses = train(run, steps, dtype, arguments.write)
    if arguments.svg:
        draw(arguments.svg, run, losses, val_losses)

    apart = {step: abs(loss - run.losses[step]) for step, loss in losses.items()}
    early = max(difference for step, difference in apart.items() if step <= EARLY_STEPS)
    late = max((difference for step, difference in apart.items() if step > EARLY_STEPS), default=0.0)
    print(f"largest difference: {early:.1e} up to step {EARLY_STEPS}, {late:.1e} later")
    # A NaN is neither larger nor smaller than what is allowed.
    sys.exit(not (early <= EARLY_TOLERANCE and late <= TOLERANCE))


if __name__ == "__main__":
    main()
