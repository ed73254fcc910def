"""A second opinion on the Transformers: losses and gradients of models.py's, which are plain PyTorch.

Parameters and batches come from formulas, so that both sides have them without exchanging any.

    python torch_gradients.py                 writes ../golden/gradients.json
    python torch_gradients.py --check FILE    compares losses and gradients in FILE, of the same form, with PyTorch's in
                                              f64; exits with 1 where ||g - g'|| / ||g'|| is above 1e-4

A case's batch has `rows` sequences of `length` positions, element i (row by row) being
    tokens[i]  = (i * 7919 + 13) mod vocab_size
    targets[i] = (i * 104729 + 7) mod vocab_size
    weights[i] = [1.0, 0.5, 0.0, 2.0][i mod 4] where `weighted`, else 1.0
and its parameters are `golden.hashed(i, parameter_scale)`, rounded to f32, over the flat vector in layout order. Where it has
`adapters`, these are frozen, and those of the adapters go on with i where they end: gradients are of the adapters alone.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import golden
from adapters import Adapters
from models import GptConfig, LlamaConfig, ModelConfig, config_of

TOLERANCE = 1e-4
"""Largest relative error of a tensor's gradient, and of the loss."""


@dataclass(frozen=True)
class Case:
    """One comparison: a model, its parameters and a batch."""

    name: str
    config: ModelConfig
    parameter_scale: float
    rows: int
    length: int
    weighted: bool
    adapters: Adapters | None = None


WITH_BIAS = GptConfig(11, 8, 2, 2, 16, bias=True, tied_head=False, gelu="exact", norm_epsilon=1e-5)
WITHOUT_BIAS = GptConfig(11, 8, 3, 2, 8, bias=False, tied_head=True, gelu="tanh", norm_epsilon=1e-5)
ODD_SIZES = GptConfig(13, 7, 1, 3, 12, bias=True, tied_head=True, gelu="tanh", norm_epsilon=1e-2)
GROUPED = LlamaConfig(
    11, 8, 2, heads=4, kv_heads=2, width=16, ffn_width=24, qk_norm=True, tied_head=True, rope_theta=1e4, norm_epsilon=1e-5
)
UNTIED = LlamaConfig(
    13, 7, 1, heads=2, kv_heads=2, width=8, ffn_width=20, qk_norm=False, tied_head=False, rope_theta=1e2, norm_epsilon=1e-2
)

# The probe's small parameters keep attention almost uniform and activations almost linear. The larger ones do not, so
# that a mistake in the scale of scores or in the kind of GELU is far above the tolerance.
CASES = [
    Case("probe_bias_untied_exact_weighted", WITH_BIAS, golden.PROBE_SCALE, rows=3, length=8, weighted=True),
    Case("probe_no_bias_tied_tanh", WITHOUT_BIAS, golden.PROBE_SCALE, rows=3, length=8, weighted=False),
    Case("large_bias_untied_exact", WITH_BIAS, 2.0, rows=3, length=8, weighted=False),
    Case("large_no_bias_tied_tanh_weighted", WITHOUT_BIAS, 2.0, rows=3, length=8, weighted=True),
    Case("odd_sizes_short_rows_weighted", ODD_SIZES, 2.0, rows=2, length=5, weighted=True),
    Case("probe_llama_grouped_qk_norm_tied", GROUPED, golden.PROBE_SCALE, rows=3, length=8, weighted=False),
    Case("large_llama_grouped_qk_norm_tied_weighted", GROUPED, 2.0, rows=3, length=8, weighted=True),
    Case("large_llama_untied_short_rows", UNTIED, 2.0, rows=2, length=5, weighted=False),
    Case(
        "adapters_of_all_projections_weighted",
        WITH_BIAS,
        0.8,
        rows=3,
        length=8,
        weighted=True,
        adapters=Adapters(3, 6.0, ("c_attn", "c_proj", "c_fc")),
    ),
    Case(
        "adapters_of_some_projections_of_a_llama",
        GROUPED,
        0.8,
        rows=3,
        length=8,
        weighted=False,
        adapters=Adapters(2, 3.0, ("q_proj", "v_proj", "self_attn.o_proj", "gate_proj", "down_proj")),
    ),
]


def case_parameters(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's parameters, rounded to f32 whatever `dtype` they are computed with, and those that are trained."""
    offset = 0

    def tensors(layout: dict[str, tuple[int, ...]], trained: bool) -> dict[str, Tensor]:
        nonlocal offset
        parameters = {}
        for name, shape in layout.items():
            count = math.prod(shape)
            values = [golden.hashed(offset + i, case.parameter_scale) for i in range(count)]
            tensor = torch.tensor(values, dtype=torch.float32).to(dtype).view(shape)
            parameters[name] = tensor.requires_grad_(trained)
            offset += count
        return parameters

    base = tensors(case.config.layout(), trained=case.adapters is None)
    if case.adapters is None:
        return base, base
    trained = tensors(case.adapters.layout(case.config), trained=True)
    return case.adapters.apply(base, trained), trained


def case_batch(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and weights, each [rows, length]."""
    indices = range(case.rows * case.length)
    shape = (case.rows, case.length)
    vocab_size = case.config.vocab_size
    tokens = torch.tensor([(i * 7919 + 13) % vocab_size for i in indices]).view(shape)
    targets = torch.tensor([(i * 104729 + 7) % vocab_size for i in indices]).view(shape)
    weights = [[1.0, 0.5, 0.0, 2.0][i % 4] if case.weighted else 1.0 for i in indices]
    return tokens, targets, torch.tensor(weights, dtype=dtype).view(shape)


def compute(case: Case, dtype: torch.dtype) -> tuple[float, float, dict[str, Tensor]]:
    """Weighted loss sum, weight sum, and the gradient of the loss sum for each tensor, computed in `dtype`."""
    parameters, trained = case_parameters(case, dtype)
    tokens, targets, weights = case_batch(case, dtype)
    losses = cross_entropy(case.config.logits(parameters, tokens).flatten(0, 1), targets.flatten(), reduction="none")
    loss_sum = (losses * weights.flatten()).sum()
    loss_sum.backward()
    gradients = {name: tensor.grad for name, tensor in trained.items() if tensor.grad is not None}
    return loss_sum.item(), weights.sum().item(), gradients


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||, in f64."""
    ours, reference = ours.double().flatten(), reference.double().flatten()
    if ours.shape != reference.shape:
        return math.inf
    norm = reference.norm().item()
    difference = (ours - reference).norm().item()
    return difference / norm if norm > 0 else math.inf if difference > 0 else 0.0


def golden_case(case: Case) -> dict[str, Any]:
    """A case with its results; prints how close PyTorch's own f32 comes to its f64."""
    loss_sum, weight_sum, gradients = compute(case, torch.float64)
    loss_sum_f32, _, gradients_f32 = compute(case, torch.float32)
    worst = max(gradients, key=lambda name: relative_error(gradients_f32[name], gradients[name]))
    error = relative_error(gradients_f32[worst], gradients[worst])
    print(f"{case.name}: f32 differs from f64 by {error:.1e} in {worst}")
    tensors = [
        {
            "name": name,
            "shape": list(gradient.shape),
            "norm": golden.significant([gradient.norm().item()], 9)[0],
            "gradient": golden.significant(gradient.flatten().tolist(), 6),
        }
        for name, gradient in gradients.items()
    ]
    sums = {"weight_sum": weight_sum, "loss_sum": loss_sum, "loss_sum_f32": loss_sum_f32}
    about = {key: value for key, value in asdict(case).items() if value is not None}
    # Sizes that are as the others make them.
    about["config"] = {key: value for key, value in about["config"].items() if key not in ("head_width", "rope_scaling")}
    return about | sums | {"tensors": tensors}


def write_golden() -> None:
    """Writes the golden file."""
    about = (
        "Losses and gradients of Transformers, by PyTorch in f64 (loss_sum_f32: f32), of the sum over positions "
        "of weight * cross-entropy. Written by peer/torch_gradients.py, which says how parameters and batches are made."
    )
    golden.write("gradients.json", {"about": about, "torch": torch.__version__, "cases": [golden_case(c) for c in CASES]})


def check_case(found: dict[str, Any]) -> float:
    """Compares one case of a file with PyTorch, a line for each tensor; returns the largest relative error."""
    case = Case(
        name=found["name"],
        config=config_of(found["config"]),
        parameter_scale=found["parameter_scale"],
        rows=found["rows"],
        length=found["length"],
        weighted=found["weighted"],
        adapters=Adapters(**found["adapters"]) if "adapters" in found else None,
    )
    loss_sum, weight_sum, gradients = compute(case, torch.float64)
    ours = {tensor["name"]: torch.tensor(tensor["gradient"], dtype=torch.float64) for tensor in found["tensors"]}
    if ours.keys() != gradients.keys():
        sys.exit(f"{case.name}: tensors {sorted(ours.keys() ^ gradients.keys())} are on one side alone")
    errors = {
        "(loss_sum)": abs(found["loss_sum"] - loss_sum) / abs(loss_sum),
        "(weight_sum)": abs(found["weight_sum"] - weight_sum) / abs(weight_sum),
    }
    errors |= {name: relative_error(ours[name], gradients[name]) for name in gradients}
    for name, error in errors.items():
        print(f"{case.name}  {name:24}  {error:.2e}{'' if error <= TOLERANCE else '  TOO LARGE'}")
    # A NaN compares as neither larger nor smaller: it counts as the largest.
    return max(math.inf if math.isnan(error) else error for error in errors.values())


def check(path: Path) -> None:
    """Compares all cases of a file, and exits with 1 where one is too far off."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    if not cases:
        sys.exit(f"{path}: there are no cases in it")
    worst = max(check_case(case) for case in cases)
    print(f"largest relative error {worst:.2e}, allowed {TOLERANCE:.0e}")
    sys.exit(worst > TOLERANCE)


def main() -> None:
    """Writes the golden file, or checks another."""
    parser = argparse.ArgumentParser(description="Losses and gradients of Transformers by PyTorch.")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare the losses and gradients in FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check:
        check(arguments.check)
    else:
        write_golden()


if __name__ == "__main__":
    main()
