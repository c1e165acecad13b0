"""The messages between a relay's parent process and its workers, as lines of JSON, and their pipes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from firezone_tunnel.apps.relay.config import EngineConfig, Secrets

# A worker's file descriptors: each pipe has one direction.
ORDERS = 0  # from the parent; EOF means that the parent has ended, and ends the worker
LOG = 1  # each line a message as `logs.writer` writes it
ERRORS = 2  # unexpected output
REPORTS = 3  # to the parent
FIRST_SOCKET = 4  # the listening sockets, one after another

MAX_LINE = 1 << 24


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """To a worker, first: serve, with this many listening sockets from FIRST_SOCKET on."""

    config: EngineConfig
    secrets: Secrets
    sockets: int
    log_level: int


class Drain(msgspec.Struct, tag="drain", frozen=True):
    """To a worker: serve present clients, then end."""


class StopDraining(msgspec.Struct, tag="stop_draining", frozen=True):
    """To a worker: end now."""


class WorkerServing(msgspec.Struct, tag="serving", frozen=True):
    """From a worker: it serves."""


class WorkerFailed(msgspec.Struct, tag="failed", frozen=True):
    """From a worker, which then ends."""

    reason: str


Order = Begin | Drain | StopDraining
Report = WorkerServing | WorkerFailed


def encode(message: Order | Report) -> bytes:
    """The message as a line."""
    return msgspec.json.encode(message) + b"\n"


def decode_order(line: bytes) -> Order:
    """
    Raises: msgspec.MsgspecError.
    """
    order: Order = _ORDERS.decode(line)
    return order


def decode_report(line: bytes) -> Report:
    """
    Raises: msgspec.MsgspecError.
    """
    report: Report = _REPORTS.decode(line)
    return report


class Lines:
    """Splits a pipe's output into lines. Lines longer than 16 MiB are dropped."""

    def __init__(self) -> None:
        self._begun = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that are complete now, without line ends. Consume them all."""
        *ended, begun = data.split(b"\n")
        for part in ended:
            line = bytes(self._begun) + part
            self._begun.clear()
            if line:
                yield line
        if len(self._begun) + len(begun) > MAX_LINE:
            self._begun.clear()
            return
        self._begun += begun


_ORDERS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Order)
_REPORTS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Report)
