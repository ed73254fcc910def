"""Many clients of `lockstep serve` at once, and how long each waits.

    lockstep serve --run RUN --listen 127.0.0.1:8099 &
    python serve_load.py 127.0.0.1:8099 [--clients 1 8 50] [--requests 4] [--tokens 120]

Each client asks for streamed continuations one after the other; at last as many clients do so again, half of whom hang up
after ten pieces. Needs the standard library alone. Prints a row of a Markdown table for each: pieces of text a second of all clients
together, and milliseconds to the first and to the last piece of one answer, median and 95th percentile.
"""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass

HANG_UP_AFTER = 10


@dataclass(frozen=True)
class Answer:
    """What one request came to."""

    pieces: int
    first_secs: float
    whole_secs: float | None
    """None where the client hung up."""


async def ask(address: str, body: dict[str, object], hangs_up: bool) -> Answer:
    """Streams one continuation."""
    host, port = address.rsplit(":", 1)
    payload = json.dumps(body).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    await writer.drain()
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{address}: {status.decode().strip()}: {(await reader.read()).decode(errors='replace')}")
    pieces, first_secs = 0, 0.0
    try:
        async for line in reader:
            if line.startswith(b"data: {"):
                pieces += 1
                first_secs = first_secs or time.perf_counter() - began
                if hangs_up and pieces == HANG_UP_AFTER:
                    return Answer(pieces, first_secs, None)
    finally:
        writer.close()
    return Answer(pieces, first_secs, time.perf_counter() - began)


async def measure(address: str, clients: int, requests: int, tokens: int, half_hang_up: bool) -> str:
    """A row of the table."""

    async def client(number: int) -> list[Answer]:
        answers = []
        for request in range(requests):
            prompt = f"Once upon a time, {number} and {request} years ago,"
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": number, "stream": True}
            answers.append(await ask(address, body, half_hang_up and number % 2 == 1))
        return answers

    began = time.perf_counter()
    answers = sum(await asyncio.gather(*(client(number) for number in range(clients))), [])
    rate = sum(answer.pieces for answer in answers) / (time.perf_counter() - began)
    first = of_all([answer.first_secs for answer in answers])
    whole = of_all([answer.whole_secs for answer in answers if answer.whole_secs is not None])
    return f"| {clients}{', half of whom hang up' if half_hang_up else ''} | {rate:,.0f} | {first} | {whole} |"


def of_all(secs: list[float]) -> str:
    """Median and 95th percentile, in milliseconds."""
    ranked = sorted(secs)
    return ", ".join(f"{1000 * ranked[int(share * (len(ranked) - 1))]:.0f}" for share in (0.5, 0.95))


async def run(args: argparse.Namespace) -> None:
    print("| clients | pieces a second | ms to the first | ms to the last |\n|---|---|---|---|", flush=True)
    for clients in args.clients:
        print(await measure(args.address, clients, args.requests, args.tokens, False), flush=True)
    print(await measure(args.address, args.clients[-1], args.requests, args.tokens, True), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 50])
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--tokens", type=int, default=120)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
