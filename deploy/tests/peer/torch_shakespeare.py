"""The reference run to compare `shakespeare-char-cpu` with: nanoGPT's character model on a CPU, in plain PyTorch.

    python torch_shakespeare.py tinyshakespeare/input.txt --seed 1 --threads 2

Settings of nanoGPT's README (https://github.com/karpathy/nanoGPT, "I only have a macbook"), with the learning rate's
decay over the run's 2000 steps. Validation is the mean over 200 fixed batches, whatever the seed, since 20 are noisy.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from models import GptConfig

BATCH = 12
CONTEXT = 64
STEPS = 2000
WARMUP_STEPS = 100
PEAK_LR, MIN_LR = 1e-3, 1e-4
VALIDATION_BATCHES = 200
VALIDATION_SEED = 1234
REPORT_EVERY_STEPS = 250


def initial_parameters(config: GptConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """GPT-2's initial values: N(0, 0.02), residual projections divided by sqrt(2 * layers), norms 1."""
    parameters = {}
    for name, shape in config.layout().items():
        std = 0.02 / math.sqrt(2 * config.layers) if "c_proj" in name else 0.02
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * std
        parameters[name] = values.requires_grad_()
    return parameters


def learning_rate(step: int) -> float:
    """The rate of a step, counted from 0: nanoGPT's linear warm-up and cosine."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / (WARMUP_STEPS + 1)
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * progress)) * (PEAK_LR - MIN_LR)


def random_batch(data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets, each [BATCH, CONTEXT], from windows at random places."""
    starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator).tolist()
    tokens = torch.stack([data[start : start + CONTEXT] for start in starts])
    targets = torch.stack([data[start + 1 : start + 1 + CONTEXT] for start in starts])
    return tokens, targets


def mean_loss(config: GptConfig, parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy over all positions."""
    tokens, targets = batch
    return cross_entropy(config.logits(parameters, tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def fixed_loss(config: GptConfig, parameters: dict[str, Tensor], data: Tensor) -> float:
    """Mean loss over batches that are the same in every call."""
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    losses = [mean_loss(config, parameters, random_batch(data, generator)) for _ in range(VALIDATION_BATCHES)]
    return torch.stack(losses).mean().item()


def train(text: str, seed: int, steps: int) -> None:
    """Trains for `steps` of the run's 2000 steps, and prints losses before, between and after."""
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    data = torch.tensor([number[character] for character in text])
    training, validation = data.split([len(data) * 9 // 10, len(data) - len(data) * 9 // 10])

    vocab_size = len(characters)
    config = GptConfig(vocab_size, CONTEXT, 4, 4, 128, bias=False, tied_head=True, gelu="exact", norm_epsilon=1e-5)
    generator = torch.Generator().manual_seed(seed)
    parameters = initial_parameters(config, generator)
    tensors = list(parameters.values())
    groups = [
        {"params": [tensor for tensor in tensors if tensor.dim() >= 2], "weight_decay": 0.1},
        {"params": [tensor for tensor in tensors if tensor.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.99), eps=1e-8)
    print(f"{sum(tensor.numel() for tensor in tensors):,} parameters, {vocab_size} characters, seed {seed}")

    started = time.monotonic()

    def report(step: int) -> None:
        train_loss, val_loss = (fixed_loss(config, parameters, part) for part in (training, validation))
        print(f"step {step}: train_loss {train_loss:.4f} val_loss {val_loss:.4f} ({time.monotonic() - started:.0f} s)")

    report(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        mean_loss(config, parameters, random_batch(training, generator)).backward()
        clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        if (step + 1) % REPORT_EVERY_STEPS == 0 or step + 1 == steps:
            report(step + 1)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="The character model of nanoGPT's CPU settings, for comparison.")
    parser.add_argument("text", type=Path, help="the corpus; its first 90 %% are trained on")
    parser.add_argument("--seed", type=int, default=1, help="of initial values and batches (default: 1)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"stop after so many steps (default: {STEPS})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.text.read_text(encoding="utf-8"), arguments.seed, arguments.steps)


if __name__ == "__main__":
    main()
