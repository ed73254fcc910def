"""A training step in PyTorch, for the shapes of `lockstep bench compute`.

    python torch_step.py --shape small --layout ddp --steps 20

Layouts: `single`, one process with all threads; `ddp`, DistributedDataParallel over gloo, two processes with one thread
each; `alone`, two such processes that exchange nothing and leave the optimizer out, which is what two workers of ours do
in a step. The others take AdamW's step, fused. Each process computes a batch of its own. With `--precision bf16`, forward
runs under autocast. Prints one line of JSON.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

WARM_UP = 3


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT-2 shaped model with biases and an untied head, and the sequences of a batch."""

    layers: int
    heads: int
    width: int
    context: int
    vocab_size: int
    rows: int


SHAPES = {
    "tiny": Shape(4, 4, 128, 64, 65, 12),
    "small": Shape(6, 6, 384, 256, 65, 4),
    "gpt2s": Shape(6, 8, 512, 256, 8192, 4),
}


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c = shape.width
        self.heads = shape.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.c_attn, self.attn_proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.c_fc, self.mlp_proj = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(c, dim=2)
        )
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.attn_proj(attended)
        return x + self.mlp_proj(self.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.width)
        self.wpe = nn.Parameter(0.02 * torch.randn(shape.context, shape.width))
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.ln_f = nn.LayerNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.blocks(self.wte(tokens) + self.wpe[: tokens.shape[1]])
        return cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def train(
    shape: Shape, layout: str, steps: int, bf16: bool, threads: int, start: object
) -> tuple[list[float], int]:
    """Seconds of each step, and the process's peak memory in bytes."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model: nn.Module = Gpt(shape)
    if layout == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(shape.vocab_size, (4, 2, shape.rows, shape.context))

    def step(index: int) -> None:
        batch = tokens[index % len(tokens)]
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(batch[0], batch[1])
        loss.backward()
        if layout != "alone":
            optimizer.step()

    for index in range(WARM_UP):
        step(index)
    if start is not None:
        start.wait()  # type: ignore[attr-defined]
    seconds = []
    for index in range(steps):
        began = time.perf_counter()
        step(index)
        seconds.append(time.perf_counter() - began)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank_main(
    rank: int, shape: Shape, layout: str, steps: int, bf16: bool, rendezvous: str, start: object, results: object
) -> None:
    """One of two processes."""
    if layout == "ddp":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results.put(train(shape, layout, steps, bf16, 1, start))  # type: ignore[attr-defined]
    if layout == "ddp":
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layout", choices=["single", "ddp", "alone"], required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()
    shape, bf16 = SHAPES[args.shape], args.precision == "bf16"
    if args.layout == "single":
        measured = [train(shape, args.layout, args.steps, bf16, os.cpu_count() or 1, None)]
    else:
        context = mp.get_context("spawn")
        start, results = context.Barrier(2), context.Queue()
        with tempfile.TemporaryDirectory() as directory:
            arguments = (shape, args.layout, args.steps, bf16, f"{directory}/rendezvous", start, results)
            ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(2)]
            for rank in ranks:
                rank.start()
            measured = [results.get() for _ in ranks]
            for rank in ranks:
                rank.join()
    medians = [statistics.median(seconds) for seconds, _ in measured]
    print(
        json.dumps(
            {
                "tokens_per_sec": sum(shape.rows * shape.context / median for median in medians),
                "step_ms_median": 1e3 * statistics.median(second for seconds, _ in measured for second in seconds),
                "peak_rss_bytes": max(peak for _, peak in measured),
            }
        )
    )


if __name__ == "__main__":
    main()
