"""A second opinion on losses of pairs of answers: theirs and their gradients by PyTorch, as TRL's trainers define them.

    python torch_pairs.py --check FILE        compares losses, rewards and gradients in FILE with PyTorch's in f64; exits with 1
                                              where ||g - g'|| / ||g'|| is above 1e-4

A case's slot has rows 2i (preferred) and 2i + 1, whose tokens, targets and parameters come from the formulas of
torch_gradients.py. `answers` says of each row from which position on it counts, and up to which; a score is read at the last of
these. `objective` is {"kind": "reward"}, or {"kind": "dpo", "beta", "label_smoothing"} with `references`, one for each row.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import golden
from models import config_of
from torch_gradients import TOLERANCE, relative_error

SCORE = "score.weight"


def parameters_of(case: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters by name, in the order of the flat vector; a score's head takes the place of the logits'."""
    settings = dict(case["config"])
    scores = settings.pop("score_head", False)
    config = config_of(settings | {"tied_head": settings["tied_head"] or scores})
    shapes = config.layout() | ({SCORE: (1, config.width)} if scores else {})
    parameters, offset = {}, 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        values = [golden.hashed(offset + i, case["parameter_scale"]) for i in range(count)]
        parameters[name] = torch.tensor(values, dtype=torch.float32).double().view(shape).requires_grad_()
        offset += count
    return parameters


def compute(case: dict[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The slot's sums, and the gradient of its loss."""
    parameters = parameters_of(case)
    settings = dict(case["config"])
    scores = settings.pop("score_head", False)
    config = config_of(settings | {"tied_head": settings["tied_head"] and not scores})
    rows, length, vocab_size = case["rows"], case["length"], settings["vocab_size"]
    indices = range(rows * length)
    tokens = torch.tensor([(i * 7919 + 13) % vocab_size for i in indices]).view(rows, length)
    targets = torch.tensor([(i * 104729 + 7) % vocab_size for i in indices]).view(rows, length)
    shown = parameters | ({"lm_head.weight": parameters[SCORE]} if scores else {})
    logits = config.logits(shown, tokens)  # [rows, length, V], or [rows, length, 1] of scores
    objective = case["objective"]
    if objective["kind"] == "reward":
        rewards = torch.stack([logits[row, end - 1, 0] for row, (_, end) in enumerate(case["answers"])])
        margins = rewards[0::2] - rewards[1::2]
        loss = -logsigmoid(margins).sum()
        log_probs = torch.zeros(rows, dtype=torch.float64)
    else:
        each = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        log_probs = torch.stack([each[row, start:end].sum() for row, (start, end) in enumerate(case["answers"])])
        references = torch.tensor(case["references"], dtype=torch.float32).double()
        rewards = objective["beta"] * (log_probs - references)
        margins, smoothing = rewards[0::2] - rewards[1::2], objective["label_smoothing"]
        loss = -(logsigmoid(margins) * (1 - smoothing) + logsigmoid(-margins) * smoothing).sum()
    loss.backward()
    sums = {
        "loss": loss.item(),
        "accurate": (margins > 0).double().sum().item(),
        "chosen_reward": rewards[0::2].sum().item(),
        "rejected_reward": rewards[1::2].sum().item(),
        "chosen_log_prob": log_probs[0::2].sum().item(),
        "rejected_log_prob": log_probs[1::2].sum().item(),
    }
    return sums, {name: tensor.grad for name, tensor in parameters.items() if tensor.grad is not None}


def check_case(found: dict[str, Any]) -> float:
    """Compares a case, a line for each number; returns the largest relative error."""
    sums, gradients = compute(found)
    ours = {tensor["name"]: torch.tensor(tensor["gradient"], dtype=torch.float64) for tensor in found["tensors"]}
    if ours.keys() != gradients.keys():
        sys.exit(f"{found['name']}: tensors {sorted(ours.keys() ^ gradients.keys())} are on one side alone")
    errors = {f"({name})": abs(found["sums"][name] - sums[name]) / max(abs(sums[name]), 1.0) for name in sums}
    errors |= {name: relative_error(ours[name], gradients[name]) for name in gradients}
    for name, error in errors.items():
        print(f"{found['name']}  {name:32}  {error:.2e}{'' if error <= TOLERANCE else '  TOO LARGE'}")
    return max(math.inf if math.isnan(error) else error for error in errors.values())


def main() -> None:
    """Compares all cases of a file, and exits with 1 where one is too far off."""
    parser = argparse.ArgumentParser(description="Losses of pairs and their gradients by PyTorch.")
    parser.add_argument("--check", type=Path, metavar="FILE", required=True, help="compare the numbers in FILE")
    cases = json.loads(parser.parse_args().check.read_text(encoding="utf-8"))["cases"]
    if not cases:
        sys.exit("there are no cases in it")
    torch.set_num_threads(1)
    worst = max(check_case(case) for case in cases)
    print(f"largest relative error {worst:.2e}, allowed {TOLERANCE:.0e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
