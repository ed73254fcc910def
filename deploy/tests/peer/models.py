"""The models in plain PyTorch, as the comments of `message Gpt` and `message Llama` in proto/lockstep.proto describe them.

Nothing here is shared with the Rust code. Parameters are a dictionary from layout name to tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class GptConfig:
    """Sizes of a GPT-2 shaped Transformer, named as in the contract."""

    vocab_size: int
    context: int
    layers: int
    heads: int
    width: int
    bias: bool
    tied_head: bool
    gelu: str
    """"exact" or "tanh"."""
    norm_epsilon: float
    dropout: float = 0.0
    kind: str = "gpt"

    def __post_init__(self) -> None:
        if self.width % self.heads or self.gelu not in ("exact", "tanh") or self.dropout != 0.0:
            raise ValueError(f"heads must divide width, gelu be exact or tanh, and dropout be 0: {self}")

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors, in the order of the flat vector."""
        c = self.width
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (self.vocab_size, c), "wpe.weight": (self.context, c)}

        def affine(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"] = shape
            if self.bias:
                shapes[f"{name}.bias"] = shape[-1:]

        for i in range(self.layers):
            affine(f"h.{i}.ln_1", c)
            affine(f"h.{i}.attn.c_attn", c, 3 * c)
            affine(f"h.{i}.attn.c_proj", c, c)
            affine(f"h.{i}.ln_2", c)
            affine(f"h.{i}.mlp.c_fc", c, 4 * c)
            affine(f"h.{i}.mlp.c_proj", 4 * c, c)
        affine("ln_f", c)
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, c)
        return shapes

    def logits(self, parameters: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]."""
        b, t = tokens.shape
        c = self.width

        def norm(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, (c,), parameters[f"{name}.weight"], parameters.get(f"{name}.bias"), self.norm_epsilon)

        def linear(x: Tensor, name: str) -> Tensor:
            y = x @ parameters[f"{name}.weight"]
            return y + parameters[f"{name}.bias"] if self.bias else y

        x = parameters["wte.weight"][tokens] + parameters["wpe.weight"][:t]  # [B, T, C]
        for i in range(self.layers):
            q, k, v = (
                _heads(part, self.heads) for part in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(c, 2)
            )
            attended = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(attended.transpose(1, 2).reshape(b, t, c), f"h.{i}.attn.c_proj")
            hidden = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            x = x + linear(gelu(hidden, approximate="tanh" if self.gelu == "tanh" else "none"), f"h.{i}.mlp.c_proj")
        head = parameters["wte.weight" if self.tied_head else "lm_head.weight"]
        return norm(x, "ln_f") @ head.T


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama shaped Transformer, named as in the contract."""

    vocab_size: int
    context: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    ffn_width: int
    qk_norm: bool
    tied_head: bool
    rope_theta: float
    norm_epsilon: float
    dropout: float = 0.0
    head_width: int = 0
    """0: width / heads."""
    rope_scaling: Sequence[float] = ()
    """Only what scales nothing."""
    kind: str = "llama"

    def __post_init__(self) -> None:
        if self.head_width or self.rope_scaling:
            raise ValueError(f"heads of another width and scaled rotations are compared by hf_models.py: {self}")
        if self.width % (2 * self.heads) or self.heads % self.kv_heads or self.dropout != 0.0:
            raise ValueError(f"heads must be even in width, kv_heads divide heads, and dropout be 0: {self}")

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors, in the order of the flat vector."""
        c, f, d = self.width, self.ffn_width, self.width // self.heads
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, c)}
        for i in range(self.layers):
            layer: dict[str, tuple[int, ...]] = {
                "input_layernorm": (c,),
                "self_attn.q_proj": (c, c),
                "self_attn.k_proj": (c, self.kv_heads * d),
                "self_attn.v_proj": (c, self.kv_heads * d),
            }
            if self.qk_norm:
                layer |= {"self_attn.q_norm": (d,), "self_attn.k_norm": (d,)}
            layer |= {
                "self_attn.o_proj": (c, c),
                "post_attention_layernorm": (c,),
                "mlp.gate_proj": (c, f),
                "mlp.up_proj": (c, f),
                "mlp.down_proj": (f, c),
            }
            shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes["norm.weight"] = (c,)
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, c)
        return shapes

    def logits(self, parameters: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]."""
        b, t = tokens.shape
        d = self.width // self.heads

        def norm(x: Tensor, name: str) -> Tensor:
            scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.norm_epsilon)
            return x * scale * parameters[f"{name}.weight"]

        # A point of the plane for each pair of elements, as a complex number of length 1.
        angles = torch.arange(t, dtype=torch.float64)[:, None] * self.rope_theta ** (
            -torch.arange(0, d, 2, dtype=torch.float64) / d
        )
        turns = torch.polar(torch.ones_like(angles), angles).to(parameters["norm.weight"].dtype.to_complex())

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            turned = torch.complex(first, second) * turns
            return torch.cat([turned.real, turned.imag], dim=-1)

        x = parameters["embed_tokens.weight"][tokens]  # [B, T, C]
        for i in range(self.layers):
            name = f"layers.{i}"
            h = norm(x, f"{name}.input_layernorm")
            q = _heads(h @ parameters[f"{name}.self_attn.q_proj.weight"], self.heads)
            k = _heads(h @ parameters[f"{name}.self_attn.k_proj.weight"], self.kv_heads)
            v = _heads(h @ parameters[f"{name}.self_attn.v_proj.weight"], self.kv_heads)
            if self.qk_norm:
                q, k = norm(q, f"{name}.self_attn.q_norm"), norm(k, f"{name}.self_attn.k_norm")
            attended = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
            x = x + attended.transpose(1, 2).reshape(b, t, -1) @ parameters[f"{name}.self_attn.o_proj.weight"]
            h = norm(x, f"{name}.post_attention_layernorm")
            gated = silu(h @ parameters[f"{name}.mlp.gate_proj.weight"]) * (h @ parameters[f"{name}.mlp.up_proj.weight"])
            x = x + gated @ parameters[f"{name}.mlp.down_proj.weight"]
        head = parameters["embed_tokens.weight" if self.tied_head else "lm_head.weight"]
        return norm(x, "norm") @ head.T


ModelConfig = GptConfig | LlamaConfig


def config_of(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a JSON object describes; its `kind` says which."""
    return {"gpt": GptConfig, "llama": LlamaConfig}[values["kind"]](**values)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] to [B, H, T, D]."""
    b, t, width = x.shape
    return x.view(b, t, heads, width // heads).transpose(1, 2)
