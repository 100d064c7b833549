"""Counts what one process sends: by calls of torch.distributed, and by the kernel's own counters of its TCP sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

from locfast.kernels.region_contrastive_loss import exchange

Calls = Counter[tuple[str, int]]
"""(kind, bytes of the tensor that this rank hands over) -> how often."""
BYTES_RECEIVED, BYTES_SENT, BYTES_RESENT = 128, 200, 208
"""Where Linux's struct tcp_info has them (include/uapi/linux/tcp.h), 64 bits each."""


@contextlib.contextmanager
def calls() -> Iterator[Calls]:
    """Every call of the region losses' exchange while it holds, each still made."""
    counted: Calls = Counter()

    def of(kind: str, function: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[kind, args[position].nbytes] += 1
            return function(*args, **kwargs)

        return call

    passes_on = dist.batch_isend_irecv

    def pass_on(ops: list[dist.P2POp]) -> list[dist.Work]:
        for op in ops:
            counted["send" if op.op is dist.isend else "receive", op.tensor.nbytes] += 1
        return passes_on(ops)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(exchange, "_all_gather", of("all_gather", exchange._all_gather, 1)))
        for name in ("all_reduce", "reduce"):
            patches.enter_context(mock.patch.object(dist, name, of(name, getattr(dist, name), 0)))
        patches.enter_context(mock.patch.object(dist, "batch_isend_irecv", pass_on))
        yield counted


def tcp_bytes() -> tuple[int, int]:
    """(sent, received) over all TCP sockets that this process has open, without what was sent again. Linux alone."""
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not of TCP
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            sent += _number(told, BYTES_SENT) - _number(told, BYTES_RESENT)
            received += _number(told, BYTES_RECEIVED)
    return sent, received


def _number(told: bytes, offset: int) -> int:
    return struct.unpack_from("Q", told, offset)[0]
