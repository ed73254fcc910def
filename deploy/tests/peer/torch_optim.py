"""A second opinion on the optimizer: parameters after up to 50 steps of PyTorch's AdamW and SGD.

    python torch_optim.py       writes ../golden/optim.json

The vector has `decayed` elements in a group with weight decay, then `plain` elements in one without. It starts at
`golden.hashed(i, parameter_scale)`; the mean gradient of step t (from 1) is
    golden.hashed(t * 1000003 + i, ((t mod 8) + 1) * gradient_scale)
so that its norm is sometimes above the clipping limit and sometimes below. Both are computed in f64 and rounded once to
f32. The learning rates come from PyTorch's schedulers: a linear warm-up, then what `decay` says.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import golden

DECAYED = 9
PLAIN = 5
PARAMETER_SCALE = 2.0
GRADIENT_SCALE = 0.25
STEPS = 50
RECORDED_STEPS = (1, 10, 50)


@dataclass(frozen=True)
class Schedule:
    """A learning rate over time, named as in a recipe."""

    steps: int
    warmup_steps: int
    decay: dict[str, Any]
    min_lr: float

    def scheduler(self, optimizer: Optimizer, peak: float) -> LRScheduler:
        """The same schedule in PyTorch's parts; its first value is that of step 1, its `warmup_steps`-th the peak."""
        warmup = LinearLR(optimizer, start_factor=1 / self.warmup_steps, total_iters=self.warmup_steps - 1)
        decay_steps = self.decay.get("steps", self.steps) - self.warmup_steps
        after: LRScheduler
        match self.decay["kind"]:
            case "constant":
                after = ConstantLR(optimizer, factor=1.0)
            case "cosine":
                after = CosineAnnealingLR(optimizer, T_max=decay_steps, eta_min=self.min_lr)
            case "linear":
                after = LinearLR(optimizer, 1.0, end_factor=self.min_lr / peak, total_iters=decay_steps)
            case kind:
                raise ValueError(f"no scheduler for a decay of kind {kind}")
        return SequentialLR(optimizer, [warmup, after], milestones=[self.warmup_steps - 1])


COSINE = Schedule(STEPS, warmup_steps=10, decay={"kind": "cosine", "steps": 50}, min_lr=1e-3)
LINEAR = Schedule(STEPS, warmup_steps=5, decay={"kind": "linear", "steps": 50}, min_lr=0.0)
CONSTANT = Schedule(STEPS, warmup_steps=2, decay={"kind": "constant"}, min_lr=0.0)


@dataclass(frozen=True)
class Case:
    """An optimizer with its schedule, named as in a recipe."""

    name: str
    rule: dict[str, Any]
    lr: float
    grad_clip: float | None
    schedule: Schedule


def adamw(beta2: float, epsilon: float, weight_decay: float) -> dict[str, Any]:
    """An AdamW rule with a first beta of 0.9."""
    return {"kind": "adamw", "beta1": 0.9, "beta2": beta2, "epsilon": epsilon, "weight_decay": weight_decay}


# The large epsilon shows where in the formula it is added.
CASES = [
    Case("adamw_clipped_cosine", adamw(0.99, 1e-8, 0.1), lr=1e-2, grad_clip=1.0, schedule=COSINE),
    Case("adamw_large_epsilon_linear", adamw(0.95, 1e-1, 0.5), lr=3e-2, grad_clip=None, schedule=LINEAR),
    Case("sgd_clipped_cosine", {"kind": "sgd"}, lr=1e-1, grad_clip=1.0, schedule=COSINE),
    Case("sgd_constant", {"kind": "sgd"}, lr=1e-1, grad_clip=None, schedule=CONSTANT),
]


def optimizer_of(case: Case, decayed: torch.Tensor, plain: torch.Tensor) -> Optimizer:
    """PyTorch's optimizer for a case."""
    rule = case.rule
    if rule["kind"] == "sgd":
        return SGD([decayed, plain], lr=case.lr)
    groups = [{"params": [decayed], "weight_decay": rule["weight_decay"]}, {"params": [plain], "weight_decay": 0.0}]
    return AdamW(groups, lr=case.lr, betas=(rule["beta1"], rule["beta2"]), eps=rule["epsilon"])


def golden_case(case: Case) -> dict[str, Any]:
    """Runs all steps of a case."""
    count = DECAYED + PLAIN
    start = torch.tensor([golden.hashed(i, PARAMETER_SCALE) for i in range(count)], dtype=torch.float32)
    decayed, plain = (part.clone().requires_grad_() for part in start.split([DECAYED, PLAIN]))
    optimizer = optimizer_of(case, decayed, plain)
    scheduler = case.schedule.scheduler(optimizer, case.lr)
    rates: list[float] = []
    recorded: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        scale = (step % 8 + 1) * GRADIENT_SCALE
        gradient = [golden.hashed(step * 1000003 + i, scale) for i in range(count)]
        decayed.grad, plain.grad = torch.tensor(gradient, dtype=torch.float32).split([DECAYED, PLAIN])
        limit = float("inf") if case.grad_clip is None else case.grad_clip
        grad_norm = clip_grad_norm_([decayed, plain], limit).item()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        if step in RECORDED_STEPS:
            parameters = golden.significant(torch.cat([decayed, plain]).tolist(), 9)
            recorded.append(
                {"step": step, "grad_norm": golden.significant([grad_norm], 9)[0], "parameters": parameters}
            )
    return {
        "name": case.name,
        "optimizer": {"rule": case.rule, "lr": case.lr, "grad_clip": case.grad_clip},
        "schedule": asdict(case.schedule),
        "learning_rates": golden.significant(rates, 12),
        "after": recorded,
    }


def main() -> None:
    """Writes the golden file."""
    torch.set_num_threads(1)
    about = (
        "Parameters in f32 after steps of PyTorch's optimizers, the norm of the mean gradient before clipping, and the "
        "learning rate of every step from 1. Written by peer/torch_optim.py, which says how parameters and gradients "
        "are made."
    )
    sizes = {
        "decayed": DECAYED,
        "plain": PLAIN,
        "parameter_scale": PARAMETER_SCALE,
        "gradient_scale": GRADIENT_SCALE,
    }
    cases = [golden_case(case) for case in CASES]
    golden.write("optim.json", {"about": about, "torch": torch.__version__, **sizes, "cases": cases})


if __name__ == "__main__":
    main()
