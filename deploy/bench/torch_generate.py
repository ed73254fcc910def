"""Generation in PyTorch with cached keys and values, for the shapes of `lockstep bench generate`.

    python torch_generate.py --shape small --repetitions 10 --threads 2

Eager, without gradients; caches are written in place. `stories` is the shape of a small Llama: what `lockstep import` makes of a
folder of that shape. Prompts are half as long as the context, and a quarter as many tokens follow, each the likeliest:
of one sequence, then of several at once. Prints medians as one line of JSON.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: of GPT-2 shape, with biases and an untied head, unless it has a feed-forward width."""

    layers: int
    heads: int
    width: int
    context: int
    vocab_size: int
    kv_heads: int = 0
    ffn_width: int = 0


SHAPES = {
    "tiny": Shape(4, 4, 128, 64, 65),
    "small": Shape(6, 6, 384, 256, 65),
    "gpt2s": Shape(6, 8, 512, 256, 8192),
    "stories": Shape(2, 8, 128, 512, 2048, kv_heads=4, ffn_width=384),
}


class Layer(nn.Module):
    """The weights of one layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c, llama = shape.width, shape.ffn_width > 0
        d = c // shape.heads
        qkv = c + 2 * (shape.kv_heads * d if llama else c)
        hidden = shape.ffn_width or 4 * c
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(c)) for _ in range(2))
        self.norm_biases = nn.ParameterList(nn.Parameter(torch.zeros(c)) for _ in range(0 if llama else 2))
        self.qkv = nn.Linear(c, qkv, bias=not llama)
        self.attention_output = nn.Linear(c, c, bias=not llama)
        self.hidden = nn.Linear(c, 2 * hidden if llama else hidden, bias=not llama)
        self.output = nn.Linear(hidden, c, bias=not llama)


class Model(nn.Module):
    """A Transformer that continues sequences."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.llama = shape.ffn_width > 0
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.places = nn.Parameter(0.02 * torch.randn(shape.context, shape.width))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.norm_bias = nn.Parameter(torch.zeros(shape.width))
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        d = shape.width // shape.heads
        angles = torch.arange(shape.context)[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d)
        self.cos, self.sin = (torch.cat([part, part], dim=1) for part in (angles.cos(), angles.sin()))

    def caches(self, rows: int) -> list[Tensor]:
        """Room for keys and values [2, B, K, T, D] of each layer."""
        s = self.shape
        size = (2, rows, s.kv_heads or s.heads, s.context, s.width // s.heads)
        return [torch.empty(size) for _ in range(s.layers)]

    def normalised(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.llama:
            return rms_norm(x, weight.shape, weight, 1e-5)
        return layer_norm(x, weight.shape, weight, bias, 1e-5)

    def turned(self, x: Tensor, start: int, end: int) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[start:end] + torch.cat([-second, first], dim=-1) * self.sin[start:end]

    def forward(self, tokens: Tensor, start: int, caches: list[Tensor]) -> Tensor:
        """The likeliest next token [B] after tokens [B, n], which stand from position `start` on."""
        s = self.shape
        b, n = tokens.shape
        end, d, kv_heads = start + n, s.width // s.heads, s.kv_heads or s.heads
        x = self.embedding(tokens)
        if not self.llama:
            x = x + self.places[start:end]
        for layer, cache in zip(self.layers, caches, strict=True):
            biases = list(layer.norm_biases) or [None, None]
            qkv = layer.qkv(self.normalised(x, layer.norms[0], biases[0]))
            q, k, v = qkv.split([s.width, kv_heads * d, kv_heads * d], dim=2)
            q = q.view(b, n, s.heads, d).transpose(1, 2)
            k = k.view(b, n, kv_heads, d).transpose(1, 2)
            if self.llama:
                q, k = self.turned(q, start, end), self.turned(k, start, end)
            cache[0][:, :, start:end] = k
            cache[1][:, :, start:end] = v.view(b, n, kv_heads, d).transpose(1, 2)
            keys, values = cache[0][:, :, :end], cache[1][:, :, :end]
            attended = scaled_dot_product_attention(q, keys, values, is_causal=n > 1, enable_gqa=kv_heads != s.heads)
            x = x + layer.attention_output(attended.transpose(1, 2).reshape(b, n, s.width))
            hidden = layer.hidden(self.normalised(x, layer.norms[1], biases[1]))
            if self.llama:
                gate, up = hidden.chunk(2, dim=-1)
                hidden = silu(gate) * up
            else:
                hidden = gelu(hidden)
            x = x + layer.output(hidden)
        last = self.normalised(x[:, -1], self.norm, None if self.llama else self.norm_bias)
        return linear(last, self.head.weight).argmax(dim=-1)


def measure(model: Model, rows: int, prompt_tokens: int, tokens: int) -> tuple[float, float]:
    """Seconds of reading prompts, and of what follows."""
    caches = model.caches(rows)
    prompts = torch.randint(model.shape.vocab_size, (rows, prompt_tokens))
    began = time.perf_counter()
    token = model(prompts, 0, caches)
    read = time.perf_counter()
    for position in range(prompt_tokens, prompt_tokens + tokens):
        token = model(token[:, None], position, caches)
    return read - began, time.perf_counter() - read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    model = Model(SHAPES[args.shape])
    prompt_tokens, tokens = model.shape.context // 2, model.shape.context // 4
    with torch.inference_mode():
        measured = []
        for _ in range(args.repetitions + 1):
            (prefill, decode) = measure(model, 1, prompt_tokens, tokens)
            measured.append((prefill, decode, measure(model, args.batch, prompt_tokens, tokens)[1]))
    prefill, decode, batch = (statistics.median(column) for column in zip(*measured[1:], strict=True))
    result = {
        "prefill_tokens_per_sec": prompt_tokens / prefill,
        "decode_tokens_per_sec": tokens / decode,
        "batch_tokens_per_sec": args.batch * tokens / batch,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
