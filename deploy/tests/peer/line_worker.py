"""A worker in another language: trains `line` over gRPC, written from the comments of proto/lockstep.proto alone.

    python line_worker.py HOST:PORT [--wrong-from STEP]

It shares no code with Lockstep but the contract, from which its stubs are generated at start. All arithmetic is plain
Python, each operation rounded to f32. Exits with 0 when the coordinator releases it, and with 1, in words, when it is
refused or when there has been no coordinator for a while. With --wrong-from it plays a broken machine: from that step on its
gradients are off.
"""

import argparse
import hashlib
import importlib
import itertools
import os
import queue
import random
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3
from grpc_tools import protoc

from rounding import BF16, F32, INT8, Rounding, add_difference, f32

PROTO = Path(__file__).resolve().parents[3] / "proto" / "lockstep.proto"
PROTOCOL_VERSION = 5
MAX_MESSAGE_BYTES = 32 * 1024 * 1024
MAX_CHUNK_BYTES = 1024 * 1024
TRANSFER_ATTEMPTS = 3
PATIENCE_SECS = 60.0
"""How long to look for a coordinator before giving up."""
RPC_TIMEOUT_SECS = 60.0

DEVICE = "cpu (plain Python)"


def load_stubs() -> tuple[Any, Any]:
    """Generates and imports the modules of messages and of the service."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--python_out={folder}", f"--grpc_python_out={folder}"]
        if protoc.main(["protoc", f"--proto_path={PROTO.parent}", *outputs, str(PROTO)]) != 0:
            sys.exit(f"{PROTO}: protoc cannot compile it")
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("lockstep_pb2"), importlib.import_module("lockstep_pb2_grpc")
        finally:
            sys.path.remove(folder)


pb, pb_grpc = load_stubs()


def say(text: str) -> None:
    """A line for people."""
    print(f"line_worker: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- arithmetic


def to_bytes(vector: list[float]) -> bytes:
    """Little-endian f32, as vectors travel."""
    return struct.pack(f"<{len(vector)}f", *vector)


def from_bytes(data: bytes) -> list[float]:
    """The reverse of `to_bytes`."""
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def probe_parameters(count: int) -> list[float]:
    """The parameters that probe leases are computed with."""
    return [f32(((i * 2654435761 % 2**32) / 2**32 - 0.5) * 0.1) for i in range(count)]


@dataclass(frozen=True)
class Sums:
    """What a slot or a block of slots comes to. The gradient is empty in an evaluation."""

    loss: float
    weight: float
    gradient: list[float]

    def __add__(self, right: "Sums") -> "Sums":
        gradient = [f32(a + b) for a, b in zip(self.gradient, right.gradient, strict=True)]
        return Sums(self.loss + right.loss, self.weight + right.weight, gradient)


class CannotCompute(Exception):
    """A lease that this worker declines, in words."""


def column(slot: Any, name: str) -> list[float]:
    """The values of a slot's column of f32 [rows, 1]."""
    for found in slot.columns:
        if found.name == name:
            shape = list(found.shape)
            if found.element_type != pb.ELEMENT_TYPE_F32 or len(shape) != 2 or shape[1] != 1:
                raise CannotCompute(f"slot {slot.slot}: column {name} should be f32 [rows, 1], and has shape {shape}")
            if len(found.data) != 4 * shape[0]:
                raise CannotCompute(f"slot {slot.slot}: column {name} has {len(found.data)} bytes for {shape[0]} rows")
            return from_bytes(found.data)
    raise CannotCompute(f"slot {slot.slot}: there is no column {name}")


def compute_slot(slot: Any, parameters: list[float], with_gradient: bool) -> Sums:
    """Squared error of y = weight * x + bias, summed over the rows in order, and its gradient."""
    weight, bias = parameters
    xs, ys = column(slot, "x"), column(slot, "y")
    if len(xs) != len(ys):
        raise CannotCompute(f"slot {slot.slot}: {len(xs)} values of x, and {len(ys)} of y")
    loss = weight_gradient = bias_gradient = 0.0
    for x, y in zip(xs, ys, strict=True):
        error = f32(f32(f32(x * weight) + bias) - y)
        loss = f32(loss + f32(error * error))
        weight_gradient = f32(weight_gradient + f32(x * (error + error)))
        bias_gradient = f32(bias_gradient + (error + error))
    return Sums(loss, float(len(xs)), [weight_gradient, bias_gradient] if with_gradient else [])


def tree_sum(level: int, index: int, slots: dict[int, Sums], rounding: Rounding) -> Sums | None:
    """The sum of block (level, index) in tree order, rounded at each node; None where it covers no existing slot."""
    if level == 0:
        total = slots.get(index)
    else:
        left = tree_sum(level - 1, 2 * index, slots, rounding)
        right = tree_sum(level - 1, 2 * index + 1, slots, rounding)
        if left is None or right is None:
            return left
        total = left + right
    return total and replace(total, gradient=rounding.round(level, index, total.gradient))


def compute_lease(lease: Any, parameters: list[float], gradient_format: int) -> tuple[Sums, list[Sums]]:
    """The sum over a lease's block, and the sums of its slots in order."""
    with_gradient = lease.WhichOneof("task") == "gradient"
    slots = {slot.slot: compute_slot(slot, parameters, with_gradient) for slot in lease.slots}
    rounding = Rounding(gradient_format, lease.seed, lease.step)
    total = tree_sum(lease.block.level, lease.block.index, slots, rounding)
    if total is None:
        raise CannotCompute(f"block ({lease.block.level}, {lease.block.index}) has no slots")
    return total, list(slots.values())


def batch_digest(lease: Any) -> bytes:
    """SHA-256 of what a lease computes: of its slots' digests, each of the slot's number and the data of its columns."""
    digest = hashlib.sha256()
    for slot in lease.slots:
        of_slot = hashlib.sha256(struct.pack("<I", slot.slot))
        for found in slot.columns:
            of_slot.update(found.data)
        digest.update(of_slot.digest())
    return digest.digest()


def probe_digest(invitation: Any) -> bytes:
    """SHA-256 of what the probe leases come to."""
    digest = hashlib.sha256()
    parameters = probe_parameters(invitation.layout.total_elements)
    for lease in invitation.probe:
        total, _ = compute_lease(lease, parameters, F32)
        digest.update(struct.pack("<dd", total.loss, total.weight))
        digest.update(to_bytes(total.gradient))
        if invitation.gradient_format != F32:
            total, _ = compute_lease(lease, parameters, invitation.gradient_format)
            digest.update(to_bytes(total.gradient))
    return digest.digest()


# ---------------------------------------------------------------------------------------------------- one membership


class Membership:
    """From being admitted to being released, or to the stream's end."""

    def __init__(self, stub: Any, invitation: Any, worker_id: int, wrong_from: int | None) -> None:
        self.stub = stub
        self.wrong_from = wrong_from
        self.invitation = invitation
        self.worker_id = worker_id
        self.version: tuple[int, bytes] | None = None
        """The number of the version in `parameters`, and its BLAKE3 as the lease gave it."""
        self.parameters: list[float] = []
        self.outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.last_heard = time.monotonic()
        self.clock_offset_nanos = 0
        self.least_delay_nanos: int | None = None

    def run(self) -> str | None:
        """Works until released, and returns the reason; None when the stream ends otherwise."""
        metadata = [
            ("lockstep-worker-id", str(self.worker_id)),
            ("lockstep-run-id", self.invitation.run_id),
            ("lockstep-incarnation", str(self.invitation.incarnation)),
        ]
        control = self.stub.Control(iter(self.outgoing.get, None), metadata=metadata)
        heart = threading.Thread(target=self.beat, args=(control,), daemon=True)
        heart.start()
        leases: dict[int, Future[None]] = {}
        device = ThreadPoolExecutor(max_workers=1)
        try:
            for message in control:
                self.last_heard = time.monotonic()
                match message.WhichOneof("kind"):
                    case "lease":
                        lease = message.lease
                        future = leases[lease.lease_id] = device.submit(self.work, lease)
                        future.add_done_callback(lambda done: self.check(done, control))
                    case "revoke":
                        if revoked := leases.get(message.revoke.lease_id):
                            revoked.cancel()
                    case "heartbeat_ack":
                        self.estimate_clock_offset(message.heartbeat_ack)
                    case "release":
                        goes_on = "; the run goes on" if message.release.run_goes_on else ""
                        return f"{message.release.reason}{goes_on}"
                leases = {lease_id: future for lease_id, future in leases.items() if not future.done()}
            say("the coordinator closed the control stream")
        except grpc.RpcError as error:
            say(f"the control stream broke: {error.code().name}: {error.details()}")
        finally:
            self.ended.set()
            self.outgoing.put(None)
            control.cancel()
            device.shutdown(cancel_futures=True)
            heart.join()
        return None

    def beat(self, control: Any) -> None:
        """Says that the worker lives, at once and then at every interval, until the coordinator is silent for too long."""
        while time.monotonic() - self.last_heard < self.invitation.liveness_timeout_ms / 1000:
            beat = pb.Heartbeat(sent_unix_nanos=time.time_ns(), clock_offset_nanos=self.clock_offset_nanos)
            self.outgoing.put(pb.WorkerMessage(heartbeat=beat))
            if self.ended.wait(self.invitation.heartbeat_interval_ms / 1000):
                return
        say("the coordinator has fallen silent")
        control.cancel()

    def estimate_clock_offset(self, ack: Any) -> None:
        """Coordinator's clock less ours, taking the coordinator's time for the middle of the quickest round trip."""
        now = time.time_ns()
        delay = now - ack.sent_unix_nanos
        if self.least_delay_nanos is None or delay < self.least_delay_nanos:
            self.least_delay_nanos = delay
            self.clock_offset_nanos = ack.received_unix_nanos - (ack.sent_unix_nanos + now) // 2

    def work(self, lease: Any) -> None:
        """Computes a lease and sends its result, or declines it."""
        try:
            self.outgoing.put(pb.WorkerMessage(result=self.result_of(lease)))
        except CannotCompute as error:
            reason = str(error).encode()[:1024].decode(errors="ignore")
            say(f"lease {lease.lease_id} declined: {reason}")
            self.outgoing.put(pb.WorkerMessage(declined=pb.LeaseDeclined(lease_id=lease.lease_id, reason=reason)))

    def check(self, done: Future[None], control: Any) -> None:
        """Ends the membership where work on a lease failed, most likely because the coordinator is gone."""
        if not done.cancelled() and (error := done.exception()):
            if not self.ended.is_set():
                say(f"work on a lease failed: {error}")
            control.cancel()

    def result_of(self, lease: Any) -> Any:
        """Everything that is to be done for one lease."""
        if self.version != (lease.version, lease.parameters_blake3):
            self.pull(lease.version, lease.parameters_blake3, lease.difference_from_blake3)
        result = pb.BlockResult(
            run_id=self.invitation.run_id,
            incarnation=self.invitation.incarnation,
            lease_id=lease.lease_id,
            step=lease.step,
            version=lease.version,
            block=lease.block,
            batch_sha256=batch_digest(lease),
        )
        start = time.time_ns()
        total, slots = compute_lease(lease, self.parameters, self.invitation.gradient_format)
        result.compute_nanos = time.time_ns() - start
        result.spans.append(span("compute", lease, start, result.compute_nanos))
        result.loss_sum, result.weight_sum = total.loss, total.weight
        if lease.WhichOneof("task") == "gradient":
            gradient = total.gradient
            if self.wrong_from is not None and lease.step >= self.wrong_from:
                gradient = [-element or 0.0 for element in gradient]
            start = time.time_ns()
            result.vector_blake3 = self.push(lease, gradient)
            result.upload_nanos = time.time_ns() - start
            result.spans.append(span("upload", lease, start, result.upload_nanos))
        else:
            result.slot_loss_sums.extend(slot.loss for slot in slots)
            result.slot_weight_sums.extend(slot.weight for slot in slots)
        return result

    def pull(self, version: int, digest: bytes, difference_from: bytes) -> None:
        """Takes over the parameters of a version, asking again where they were damaged on the way or are other ones."""
        request = pb.PullRequest(
            run_id=self.invitation.run_id, incarnation=self.invitation.incarnation, version=version
        )
        request.difference = difference_from != b"" and self.version is not None and self.version[1] == difference_from
        for _ in range(TRANSFER_ATTEMPTS):
            try:
                vector = join_chunks(self.stub.Pull(request, timeout=RPC_TIMEOUT_SECS))
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    raise CannotCompute(f"version {version} is not published: {error.details()}") from error
                raise
            if request.difference:
                request.difference = False
                if vector is None or len(vector) != 2 * len(self.parameters):
                    continue
                vector = to_bytes(add_difference(self.parameters, vector))
            if vector is None or len(vector) != 4 * self.invitation.layout.total_elements:
                continue
            if digest in (b"", blake3(vector).digest()):
                self.version, self.parameters = (version, digest), from_bytes(vector)
                return
        raise ConnectionError(f"version {version} of the parameters came damaged {TRANSFER_ATTEMPTS} times")

    def push(self, lease: Any, gradient: list[float]) -> bytes:
        """Sends a gradient, again where it was damaged on the way, and returns its BLAKE3."""
        digest = blake3(to_bytes(gradient)).digest()
        vector = Rounding(self.invitation.gradient_format, lease.seed, lease.step).encode(gradient)
        header = pb.PushHeader(
            run_id=self.invitation.run_id,
            incarnation=self.invitation.incarnation,
            worker_id=self.worker_id,
            lease_id=lease.lease_id,
            total_bytes=len(vector),
            vector_blake3=digest,
        )
        metadata = [("traceparent", lease.traceparent)] if lease.traceparent else []
        for attempt in itertools.count(1):
            try:
                self.stub.Push(push_messages(header, vector), metadata=metadata, timeout=RPC_TIMEOUT_SECS)
                break
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.DATA_LOSS or attempt == TRANSFER_ATTEMPTS:
                    raise
        return digest


def join_chunks(chunks: Iterable[Any]) -> bytes | None:
    """The vector that arrives in chunks; None where one of them is damaged or out of order."""
    vector = bytearray()
    for chunk in chunks:
        if chunk.offset_bytes != len(vector) or zlib.crc32(chunk.data) != chunk.crc32:
            return None
        vector += chunk.data
    return bytes(vector)


def push_messages(header: Any, vector: bytes) -> Iterator[Any]:
    """The header, then the vector in chunks."""
    yield pb.PushMessage(header=header)
    for offset in range(0, len(vector), MAX_CHUNK_BYTES):
        data = vector[offset : offset + MAX_CHUNK_BYTES]
        yield pb.PushMessage(chunk=pb.Chunk(offset_bytes=offset, data=data, crc32=zlib.crc32(data)))


def span(name: str, lease: Any, start_unix_nanos: int, duration_nanos: int) -> Any:
    """One span of work on a lease, a child of its step's."""
    parent = lease.traceparent.split("-")
    return pb.SpanTiming(
        name=name,
        start_unix_nanos=start_unix_nanos,
        duration_nanos=duration_nanos,
        step=lease.step,
        slot=lease.slots[0].slot,
        span_id=random.getrandbits(64) or 1,
        parent_span_id=int(parent[2], 16) if len(parent) == 4 else 0,
    )


# ---------------------------------------------------------------------------------------------------- joining


def join(stub: Any, name: str, wrong_from: int | None) -> Membership:
    """Asks what is trained, computes the probe, and becomes a member. Exits where there is no use in trying again."""
    request = pb.JoinRequest(protocol_version=PROTOCOL_VERSION, name=name, device=DEVICE)
    try:
        invitation = stub.Join(request, timeout=RPC_TIMEOUT_SECS)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            sys.exit(f"line_worker: another version of the protocol: {error.details()}")
        raise
    model = invitation.model.WhichOneof("kind")
    if model != "line":
        sys.exit(f"line_worker: the run trains a model of kind {model}; this worker computes line alone")
    if invitation.HasField("local_optimizer"):
        sys.exit("line_worker: the run's slots are replicas that take local steps; this worker computes gradients alone")
    if invitation.gradient_format not in (F32, BF16, INT8):
        sys.exit(f"line_worker: gradients are rounded to format {invitation.gradient_format}, which it does not know")
    reply = stub.Admit(
        pb.AdmitRequest(
            run_id=invitation.run_id,
            incarnation=invitation.incarnation,
            protocol_version=PROTOCOL_VERSION,
            name=name,
            device=DEVICE,
            probe_sha256=probe_digest(invitation),
        ),
        timeout=RPC_TIMEOUT_SECS,
    )
    if reply.WhichOneof("verdict") == "refusal":
        sys.exit(f"line_worker: refused: {reply.refusal}")
    if reply.WhichOneof("verdict") == "release":
        say(f"released: {reply.release}")
        sys.exit()
    say(f"member {reply.worker_id} of run {invitation.run_id}, start {invitation.incarnation}")
    return Membership(stub, invitation, reply.worker_id, wrong_from)


def serve(address: str, name: str, wrong_from: int | None) -> None:
    """Joins, works, and joins again when the connection is lost, until released."""
    options = [(f"grpc.max_{way}_message_length", MAX_MESSAGE_BYTES) for way in ("send", "receive")]
    delay_secs = 0.1
    give_up_at = time.monotonic() + PATIENCE_SECS
    while True:
        with grpc.insecure_channel(address, options=options) as channel:
            try:
                membership = join(pb_grpc.LockstepStub(channel), name, wrong_from)
                if (reason := membership.run()) is not None:
                    say(f"released: {reason}")
                    return
                delay_secs, give_up_at = 0.1, time.monotonic() + PATIENCE_SECS
            except grpc.RpcError as error:
                if time.monotonic() > give_up_at:
                    sys.exit(f"line_worker: {address}: no coordinator for {PATIENCE_SECS:.0f} s: {error.details()}")
                say(f"{address}: {error.code().name}: {error.details()}; trying again within {delay_secs:.1f} s")
        time.sleep(delay_secs * random.uniform(0.5, 1.0))
        delay_secs = min(2 * delay_secs, 5.0)


def main() -> None:
    """Reads the command line and works."""
    parser = argparse.ArgumentParser(description="A worker for `line` in plain Python.")
    parser.add_argument("address", metavar="HOST:PORT", help="where the coordinator listens")
    parser.add_argument("--name", default=f"{os.uname().nodename[:48]}:python", help="of the hardware")
    parser.add_argument("--wrong-from", type=int, metavar="STEP", help="compute wrong gradients from this step on")
    arguments = parser.parse_args()
    try:
        serve(arguments.address, arguments.name, arguments.wrong_from)
    except KeyboardInterrupt:
        sys.exit("line_worker: interrupted")


def exit_status() -> int:
    """Runs, and says in words why it ended where that is asked for."""
    try:
        main()
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr, flush=True)
            return 1
        return ending.code or 0
    return 0


if __name__ == "__main__":
    # Without the interpreter's own end, in which a call that is collected may wait for ever: for a lock of gRPC's, held by a
    # thread that is not run any more.
    os._exit(exit_status())
