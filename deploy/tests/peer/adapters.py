"""Low-rank adapters in plain PyTorch, as the comments of `message Adapters` in proto/lockstep.proto describe them: what is
trained is added to the frozen weights, and autograd does the rest."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from models import ModelConfig


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters beside the projections of the blocks whose names end with one of `targets`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def layout(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors that are trained, in the order of the flat vector."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in model.layout().items():
            if self.adapts(name):
                stem = name.removesuffix(".weight")
                shapes[f"{stem}.lora_A.weight"] = (shape[0], self.rank)
                shapes[f"{stem}.lora_B.weight"] = (self.rank, shape[1])
        return shapes

    def adapts(self, name: str) -> bool:
        """Whether the tensor of this name has an adapter."""
        return any(name.endswith(f".{target}.weight") for target in self.targets)

    def apply(self, base: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters, W + alpha / rank * A B where W has an adapter."""

        def tensor(name: str, weight: Tensor) -> Tensor:
            if not self.adapts(name):
                return weight
            stem = name.removesuffix(".weight")
            return weight + self.alpha / self.rank * trained[f"{stem}.lora_A.weight"] @ trained[f"{stem}.lora_B.weight"]

        return {name: tensor(name, weight) for name, weight in base.items()}
