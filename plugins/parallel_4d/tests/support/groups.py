"""Process groups in plain Python, over loopback sockets: what the parallel tests need of NCCL, on a CPU.

A CPU build of Paddle has gloo, which lacks reduce_scatter, sums float16 wrongly and hangs in groups of four ranks.
``install()`` makes every group that Paddle creates for its gloo backend a ``ProcessGroup`` of this module. Paddle's own
Python layer stays above it, and its TCPStore is where the ranks find each other.

What it promises: sums are made in the order of the ranks, so that they repeat; float16 and bfloat16 are summed in
float32 and rounded once; tensors are read and written where they lie, as NCCL does, so views of a buffer work and a
tensor with gaps is refused; what a call expects and what comes must agree in operation, dtype and number of elements;
and a wait ends with an error that names the group and the rank that is missing.

What it hides: a send never waits for its receive, so an order of blocking sends that deadlocks NCCL passes here.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import math
import os
import pickle
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

TIMEOUT_VARIABLE = "RANK_GROUPS_TIMEOUT"  # seconds that a rank waits for another one; 60 if unset
HOST = "127.0.0.1"


def install() -> None:
    """Let ``fleet.init`` and ``new_group`` make groups of this module wherever they would make gloo's."""
    from paddle.base import core
    from paddle.distributed import collective, parallel

    if getattr(collective._new_process_group_impl, "is_of_tests", False):
        return
    original = collective._new_process_group_impl
    connect = core.create_or_get_global_tcp_store

    def create(backend: str, store: Any, rank: int, size: int, *args: Any, group_id: int = 0, **options: Any) -> Any:
        if backend != "gloo":
            return original(backend, store, rank, size, *args, group_id=group_id, **options)
        return ProcessGroup(store, rank, size, group_id)

    def connect_late() -> Any:
        if os.environ.get("PADDLE_TRAINER_ID", "0") != "0" and "PADDLE_MASTER" in os.environ:
            _wait_for_listener(int(os.environ["PADDLE_MASTER"].rpartition(":")[2]))
        return connect()

    core.create_or_get_global_tcp_store = connect_late
    create.is_of_tests = True  # type: ignore[attr-defined]
    collective._new_process_group_impl = parallel._new_process_group_impl = create


def _wait_for_listener(port: int) -> None:
    """Wait until a process of this machine listens there: Paddle's store tries again after 3 s only."""
    deadline = time.monotonic() + _timeout()
    while not _listens(port):
        if time.monotonic() > deadline:
            me = os.environ["PADDLE_TRAINER_ID"]
            raise TimeoutError(f"Rank {me} waited {_timeout():g} s for rank 0, which has not opened Paddle's store.")
        time.sleep(0.005)


def _listens(port: int) -> bool:
    tables = [table for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if table.exists()]
    sockets = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return any(state == "0A" and local.endswith(f":{port:04X}") for _, local, _, state, *_ in sockets)


def _timeout() -> float:
    return float(os.environ.get(TIMEOUT_VARIABLE, "60"))


# --- tensors as bytes ---------------------------------------------------------------------------------------


def memory(tensor: Any) -> np.ndarray:
    """The tensor's own memory, uint8 [bytes]: what is written there is in the tensor."""
    if not tensor.place.is_cpu_place() or not tensor.is_contiguous():
        raise ValueError(f"A group communicates contiguous tensors on the CPU, not this one: {tensor.shape}.")
    size = math.prod(tensor.shape) * tensor.element_size()
    if not size:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))


def dtype_of(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("paddle.")


def widened(part: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes as numbers to calculate with: float32 for the two formats of 16 bits."""
    if dtype == "bfloat16":
        return (part.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    numbers = part.view(dtype)
    return numbers.astype(np.float32) if dtype == "float16" else numbers


def narrowed(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as bytes of ``dtype``, rounded to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = numbers.astype(np.float32).view(np.uint32)
        rounded = np.where(np.isnan(numbers), bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))
        return (rounded >> 16).astype(np.uint16).view(np.uint8)
    return np.ascontiguousarray(numbers.astype(dtype)).view(np.uint8)


def reduced(parts: Sequence[np.ndarray], dtype: str, operation: Any) -> np.ndarray:
    """The parts' sum, mean, greatest, least or product, element by element, in the order given; all are bytes."""
    functions: dict[str, Callable[..., np.ndarray]] = {
        "SUM": np.add,
        "AVG": np.add,
        "MAX": np.maximum,
        "MIN": np.minimum,
        "PRODUCT": np.multiply,
    }
    total = functools.reduce(functions[operation.name], [widened(part, dtype) for part in parts])
    return narrowed(total / len(parts) if operation.name == "AVG" else total, dtype)


# --- the sockets of a process -------------------------------------------------------------------------------


class Mailbox:
    """What this process sends and has been sent. A thread for each sender takes messages in, so no send blocks."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, queue.Queue[Any]] = collections.defaultdict(queue.Queue)
        self._lock = threading.Lock()
        self._connections: dict[int, socket.socket] = {}
        self.came = 0.0
        """When the latest of what was received had come, by the machine's monotonic clock."""
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._take_in, args=(connection.makefile("rb"),), daemon=True).start()

    def _take_in(self, stream: BinaryIO) -> None:
        while len(header := stream.read(8)) == 8:
            address, message = pickle.loads(stream.read(struct.unpack("<Q", header)[0]))
            self._queue(address).put((time.monotonic(), message))

    def _queue(self, address: Hashable) -> queue.Queue[Any]:
        with self._lock:
            return self._queues[address]

    def send(self, port: int, address: Hashable, message: Any, timeout: float) -> None:
        """Put ``message`` under ``address`` into the mailbox that listens at ``port``."""
        if port == self.port:
            self._queue(address).put((time.monotonic(), message))
            return
        if port not in self._connections:
            self._connections[port] = socket.create_connection((HOST, port), timeout)
            self._connections[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frame = pickle.dumps((address, message), protocol=5)
        self._connections[port].sendall(struct.pack("<Q", len(frame)) + frame)

    def receive(self, address: Hashable, timeout: float) -> Any:
        """The next message under ``address``; raises queue.Empty after ``timeout`` seconds."""
        came, message = self._queue(address).get(timeout=timeout)
        self.came = max(self.came, came)
        return message


@functools.cache
def mailbox() -> Mailbox:
    return Mailbox()


# --- groups -------------------------------------------------------------------------------------------------


class Task:
    """A communication under way. Those of one lane end in the order in which they began, whichever is waited for."""

    def __init__(self, lane: collections.deque[Task], complete: Callable[[], None]) -> None:
        self._lane, self._complete, self._done = lane, complete, False
        lane.append(self)

    def wait(self, timeout: Any = None) -> bool:
        while not self._done:
            first = self._lane.popleft()
            first._complete()
            first._done = True
        return True

    def is_completed(self) -> bool:
        return self._done

    def synchronize(self) -> None:
        self.wait()


class ProcessGroup:
    """One rank's end of a group, with the methods of Paddle's ProcessGroup that its Python layer calls.

    ``rank``, ``src``, ``dst`` and ``peer`` count inside the group. Data leave at the call. They are written into the
    tensors at once if ``sync_op``, else when the returned task is waited for.
    """

    def __init__(self, store: Any, rank: int, size: int, group_id: int) -> None:
        self._rank, self._size, self._id = rank, size, group_id
        self._lanes: dict[Hashable, collections.deque[Task]] = collections.defaultdict(collections.deque)
        self._timeout = _timeout()
        self._ports: list[int] = []
        self._world_ranks: list[int] = []
        # The store's get() can block for a quarter of an hour. A number can be read by adding 0, and is 0 if unset.
        store.set(f"rank-groups/{group_id}/{rank}", str(mailbox().port | int(os.environ["PADDLE_TRAINER_ID"]) << 16))
        deadline = time.monotonic() + self._timeout
        for peer in range(size):
            while not (entry := store.add(f"rank-groups/{group_id}/{peer}", 0)):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"Rank {os.environ['PADDLE_TRAINER_ID']} waited {self._timeout:g} s for member {peer} of the "
                        f"{size} of group {group_id}: it has not joined."
                    )
                time.sleep(0.002)
            self._ports.append(entry & 0xFFFF)
            self._world_ranks.append(entry >> 16)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def name(self) -> str:
        return "GLOO"

    def __str__(self) -> str:
        return f"group {self._id} (ranks {', '.join(map(str, self._world_ranks))})"

    def _send(self, peer: int, lane: Hashable, what: str, data: Any) -> None:
        """``what`` names operation, dtype and number of elements, for the receiver to compare; ``data`` are bytes."""
        try:
            mailbox().send(self._ports[peer], (self._id, lane, self._rank), (what, bytes(data)), self._timeout)
        except OSError as error:
            me, other = self._world_ranks[self._rank], self._world_ranks[peer]
            raise ConnectionError(f"Rank {me} cannot send to rank {other}: {what}, {self}: {error}.") from error

    def _receive(self, peer: int, lane: Hashable, what: str) -> np.ndarray:
        me, other = self._world_ranks[self._rank], self._world_ranks[peer]
        try:
            theirs, data = mailbox().receive((self._id, lane, peer), self._timeout)
        except queue.Empty:
            waited = f"Rank {me} waited {self._timeout:g} s for rank {other}: {what}, {self}."
            raise TimeoutError(waited) from None
        if theirs != what:
            raise RuntimeError(f"Rank {me} is at {what}, but rank {other} at {theirs}: {self}.")
        return np.frombuffer(data, np.uint8)

    def _begin(self, lane: Hashable, complete: Callable[[], None], sync_op: bool) -> Task:
        task = Task(self._lanes[lane], complete)
        if sync_op:
            task.wait()
        return task

    def _exchange(
        self, what: str, data: Sequence[Any], use: Callable[[list[np.ndarray]], None], sync_op: bool = True
    ) -> Task:
        """Send ``data[i]`` to rank i; then ``use`` what came, in the order of the ranks."""
        for peer in range(self._size):
            self._send(peer, "collective", what, data[peer])

        def complete() -> None:
            use([self._receive(peer, "collective", what) for peer in range(self._size)])

        return self._begin("collective", complete, sync_op)

    def _reduce(self, name: str, out: Any, data: Sequence[np.ndarray], op: Any, sync_op: bool) -> Task:
        """Send ``data[i]`` to rank i; then ``out`` is the reduction of what came."""

        def use(parts: list[np.ndarray]) -> None:
            memory(out)[:] = reduced(parts, dtype_of(out), op)

        return self._exchange(_what(f"{name} {op.name}", out), data, use, sync_op)

    def barrier(self, *device: int) -> Task:
        return self._exchange("barrier", [b""] * self._size, lambda parts: None)

    def all_reduce(self, tensor: Any, op: Any, sync_op: bool = True) -> Task:
        return self._reduce("all_reduce", tensor, [memory(tensor)] * self._size, op, sync_op)

    def reduce_scatter(self, out: Any, tensors: Sequence[Any], op: Any, sync_op: bool = True) -> Task:
        return self._reduce("reduce_scatter", out, [memory(tensor) for tensor in tensors], op, sync_op)

    def reduce_scatter_tensor(self, out: Any, tensor: Any, op: Any, sync_op: bool = True) -> Task:
        """``tensor``: one piece as large as ``out`` for each rank, one after the other."""
        _check_pieces(out, tensor, self._size)
        return self._reduce("reduce_scatter", out, [*memory(tensor).reshape(self._size, -1)], op, sync_op)

    def all_gather(self, outs: Sequence[Any], tensor: Any, sync_op: bool = True) -> Task:
        def use(parts: list[np.ndarray]) -> None:
            for out, part in zip(outs, parts, strict=True):
                memory(out)[:] = part

        return self._exchange(_what("all_gather", tensor), [memory(tensor)] * self._size, use, sync_op)

    def all_gather_into_tensor(self, out: Any, tensor: Any, sync_op: bool = True) -> Task:
        """``out``: as large as all ranks' tensors, one after the other."""
        _check_pieces(tensor, out, self._size)

        def use(parts: list[np.ndarray]) -> None:
            memory(out)[:] = np.concatenate(parts)

        return self._exchange(_what("all_gather", tensor), [memory(tensor)] * self._size, use, sync_op)

    def all_to_all_single(
        self, out: Any, tensor: Any, out_sizes: Sequence[int], sizes: Sequence[int], sync_op: bool = True
    ) -> Task:
        """``tensor``: ``sizes[i]`` rows for rank i, one after the other; ``out``: ``out_sizes[i]`` rows from it. As
        many for each, without sizes."""
        sizes = sizes or [tensor.shape[0] // self._size] * self._size
        out_sizes = out_sizes or [out.shape[0] // self._size] * self._size
        rows, outs = memory(tensor), memory(out)
        row = math.prod(tensor.shape[1:]) * tensor.element_size()
        if rows.size != sum(sizes) * row or outs.size != sum(out_sizes) * row:
            raise ValueError(f"Rows {sizes} and {out_sizes} are not those of {tensor.shape} and {out.shape}.")

        def use(parts: list[np.ndarray]) -> None:
            found = [part.size // row for part in parts]
            if found != list(out_sizes):
                raise ValueError(f"Rank {self._world_ranks[self._rank]} expects {out_sizes} rows, and {found} came.")
            outs[:] = np.concatenate(parts)

        ends = np.cumsum(np.asarray(sizes) * row)
        return self._exchange(f"all_to_all, {dtype_of(tensor)}", np.split(rows, ends[:-1]), use, sync_op)

    def broadcast(self, tensor: Any, src: int, sync_op: bool = True) -> Task:
        what = _what(f"broadcast from {self._world_ranks[src]}", tensor)
        if self._rank == src:
            for peer in range(self._size):
                self._send(peer, "collective", what, memory(tensor))

        def complete() -> None:
            memory(tensor)[:] = self._receive(src, "collective", what)

        return self._begin("collective", complete, sync_op)

    def send(self, tensor: Any, dst: int, sync_op: bool = True) -> Task:
        self._send(dst, "peer", _what("send and recv", tensor), memory(tensor))
        return self._begin(("to", dst), lambda: None, sync_op=True)

    def recv(self, tensor: Any, src: int, sync_op: bool = True) -> Task:
        def complete() -> None:
            memory(tensor)[:] = self._receive(src, "peer", _what("send and recv", tensor))

        return self._begin(("from", src), complete, sync_op)

    def _start_coalescing(self) -> None:
        """``batch_isend_irecv`` calls this and the next around its operations: no send blocks, so nothing is due."""

    def _end_coalescing(self, *tasks: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        """``all_reduce_on_calc_stream`` and the like: a CPU has one stream."""
        if name.endswith("_on_calc_stream"):
            return getattr(self, name.removesuffix("_on_calc_stream"))
        raise AttributeError(f"The tests' process group has no {name}.")


def _what(operation: str, tensor: Any) -> str:
    return f"{operation}, {dtype_of(tensor)} [{math.prod(tensor.shape)}]"


def _check_pieces(piece: Any, whole: Any, count: int) -> None:
    if math.prod(piece.shape) * count != math.prod(whole.shape) or piece.dtype != whole.dtype:
        raise ValueError(
            f"{count} pieces of {piece.dtype} {piece.shape} do not make {whole.dtype} {whole.shape}: "
            "a collective call needs tensors that fit."
        )
