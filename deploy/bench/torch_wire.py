"""PyTorch's all-reduce over gloo, beside `lockstep bench wire`.

    python torch_wire.py --floats 50000000 --workers 2 --steps 20

Processes with one thread each sum a vector of ones, all of them together; a step ends when the last has the sum. Prints
one line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WARM_UP = 3


def rank_main(rank: int, workers: int, floats: int, steps: int, rendezvous: str, results: object) -> None:
    """One of the processes. The first one measures."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    seconds = []
    for _ in range(WARM_UP + steps):
        vector = torch.ones(floats)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(vector)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        assert vector[0] == vector[-1] == workers
    if rank == 0:
        results.put(seconds[WARM_UP:])  # type: ignore[attr-defined]
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floats", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (args.workers, args.floats, args.steps, f"{directory}/rendezvous", results)
        ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(args.workers)]
        for rank in ranks:
            rank.start()
        seconds = results.get()
        for rank in ranks:
            rank.join()
    print(json.dumps({"all_reduce_ms_median": 1e3 * statistics.median(seconds)}))


if __name__ == "__main__":
    main()
