"""A second opinion on the optimizer: parameters after up to 50 steps of PyTorch's AdamW and SGD (Nesterov's, too), and of Muon.

    python torch_optim.py       writes ../golden/optim.json

The flat vector consists of `tensors`; those of two dimensions have weight decay. It starts at
`golden.hashed(i, parameter_scale)`; the mean gradient of step t (from 1) is
    golden.hashed(t * 1000003 + i, ((t mod 8) + 1) * gradient_scale)
so that its norm is sometimes above the clipping limit and sometimes below. Both are computed in f64 and rounded once to
f32. The learning rates come from PyTorch's schedulers: a linear warm-up, then what `decay` says.

PyTorch's own Muon rounds to bf16, so that `Muon` below computes its formula in f64; that PyTorch's comes near to it is
checked. Of the tensors, `lm_head.weight` and the vector follow AdamW even so.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import Muon as RoundedMuon
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import golden

TENSORS: dict[str, tuple[int, ...]] = {"wide": (3, 5), "tall": (4, 2), "lm_head.weight": (3, 3), "plain": (5,)}
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


def muon(momentum: float, weight_decay: float) -> dict[str, Any]:
    """A Muon rule."""
    return adamw(0.95, 1e-8, weight_decay) | {"kind": "muon", "momentum": momentum}


# The large epsilon shows where in the formula it is added.
CASES = [
    Case("adamw_clipped_cosine", adamw(0.99, 1e-8, 0.1), lr=1e-2, grad_clip=1.0, schedule=COSINE),
    Case("adamw_large_epsilon_linear", adamw(0.95, 1e-1, 0.5), lr=3e-2, grad_clip=None, schedule=LINEAR),
    Case("muon_clipped_cosine", muon(0.95, 0.1), lr=1e-2, grad_clip=1.0, schedule=COSINE),
    Case("muon_little_momentum_linear", muon(0.6, 0.5), lr=3e-2, grad_clip=None, schedule=LINEAR),
    Case("nesterov_constant", {"kind": "nesterov", "momentum": 0.9}, lr=1e-1, grad_clip=None, schedule=CONSTANT),
    Case("nesterov_clipped_linear", {"kind": "nesterov", "momentum": 0.6}, lr=7e-1, grad_clip=1.0, schedule=LINEAR),
    Case("sgd_clipped_cosine", {"kind": "sgd"}, lr=1e-1, grad_clip=1.0, schedule=COSINE),
    Case("sgd_constant", {"kind": "sgd"}, lr=1e-1, grad_clip=None, schedule=CONSTANT),
]


class Muon(Optimizer):
    """Nesterov's momentum through five Newton-Schulz steps, scaled by 0.2 * sqrt(max(rows, columns)), in f64."""

    def __init__(self, params: list[torch.Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state.setdefault(matrix, {"momentum": torch.zeros_like(matrix, dtype=torch.float64)})
                gradient = matrix.grad.double()
                state["momentum"] += (1 - group["momentum"]) * (gradient - state["momentum"])
                nesterov = group["momentum"] * state["momentum"] + (1 - group["momentum"]) * gradient
                x = nesterov.T if matrix.shape[0] > matrix.shape[1] else nesterov
                x = x / x.norm()
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
                x = x.T if matrix.shape[0] > matrix.shape[1] else x
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_((group["lr"] * 0.2 * max(matrix.shape) ** 0.5 * x).to(matrix.dtype))


def optimizers_of(case: Case, tensors: dict[str, torch.Tensor], muon_type: type[Optimizer]) -> list[Optimizer]:
    """PyTorch's optimizers for a case, of which each has some of the tensors."""
    rule = case.rule
    if rule["kind"] == "sgd":
        return [SGD(tensors.values(), lr=case.lr)]
    if rule["kind"] == "nesterov":
        return [SGD(tensors.values(), lr=case.lr, momentum=rule["momentum"], nesterov=True)]
    hidden = [t for name, t in tensors.items() if rule["kind"] == "muon" and t.dim() == 2 and name != "lm_head.weight"]
    others = [t for t in tensors.values() if all(t is not matrix for matrix in hidden)]
    groups = [
        {"params": [t for t in others if t.dim() == 2], "weight_decay": rule["weight_decay"]},
        {"params": [t for t in others if t.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [AdamW(groups, lr=case.lr, betas=(rule["beta1"], rule["beta2"]), eps=rule["epsilon"])]
    if hidden:
        more = {"adjust_lr_fn": "match_rms_adamw"} if muon_type is RoundedMuon else {}
        settings = {"lr": case.lr, "momentum": rule["momentum"], "weight_decay": rule["weight_decay"]}
        optimizers.append(muon_type(hidden, **settings, **more))
    return optimizers


def golden_case(case: Case, muon_type: type[Optimizer] = Muon) -> dict[str, Any]:
    """Runs all steps of a case."""
    counts = [math.prod(shape) for shape in TENSORS.values()]
    start = torch.tensor([golden.hashed(i, PARAMETER_SCALE) for i in range(sum(counts))], dtype=torch.float32)
    tensors = {
        name: values.clone().view(shape).requires_grad_()
        for (name, shape), values in zip(TENSORS.items(), start.split(counts), strict=True)
    }
    optimizers = optimizers_of(case, tensors, muon_type)
    schedulers = [case.schedule.scheduler(optimizer, case.lr) for optimizer in optimizers]
    rates: list[float] = []
    recorded: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        scale = (step % 8 + 1) * GRADIENT_SCALE
        gradient = torch.tensor([golden.hashed(step * 1000003 + i, scale) for i in range(sum(counts))])
        for tensor, values in zip(tensors.values(), gradient.split(counts), strict=True):
            tensor.grad = values.float().view(tensor.shape)
        limit = float("inf") if case.grad_clip is None else case.grad_clip
        grad_norm = clip_grad_norm_(tensors.values(), limit).item()
        rates.append(optimizers[0].param_groups[0]["lr"])
        for part in [*optimizers, *schedulers]:
            part.step()
        if step in RECORDED_STEPS:
            parameters = torch.cat([tensor.flatten() for tensor in tensors.values()]).tolist()
            recorded.append(
                {
                    "step": step,
                    "grad_norm": golden.significant([grad_norm], 9)[0],
                    "parameters": golden.significant(parameters, 9),
                }
            )
    return {
        "name": case.name,
        "optimizer": {"rule": case.rule, "lr": case.lr, "grad_clip": case.grad_clip},
        "schedule": asdict(case.schedule),
        "learning_rates": golden.significant(rates, 12),
        "after": recorded,
    }


def check_muon(case: Case) -> None:
    """Sees to it that PyTorch's Muon comes as near to ours as its roundings let it."""
    ours, theirs = (golden_case(case, muon_type)["after"][-1]["parameters"] for muon_type in (Muon, RoundedMuon))
    way = math.dist(ours, [golden.hashed(i, PARAMETER_SCALE) for i in range(len(ours))])
    error = math.dist(ours, theirs) / way
    print(f"{case.name}: PyTorch's Muon ends {error:.1%} of the way off")
    assert error < 0.05


def main() -> None:
    """Writes the golden file."""
    torch.set_num_threads(1)
    about = (
        "Parameters in f32 after steps of PyTorch's optimizers and of Muon, the norm of the mean gradient before clipping, and the "
        "learning rate of every step from 1. Written by peer/torch_optim.py, which says how parameters and gradients "
        "are made."
    )
    sizes = {
        "tensors": [{"name": name, "shape": list(shape)} for name, shape in TENSORS.items()],
        "parameter_scale": PARAMETER_SCALE,
        "gradient_scale": GRADIENT_SCALE,
    }
    cases = [golden_case(case) for case in CASES]
    for case in CASES:
        if case.rule["kind"] == "muon":
            check_muon(case)
    golden.write("optim.json", {"about": about, "torch": torch.__version__, **sizes, "cases": cases})


if __name__ == "__main__":
    main()
