"""Flood a relay on loopback with hostile datagrams from many addresses.

    python -m benchmarks.relay_flood [--count 1000000] [--workers N] [--requests] [--seed N]

The flood must not crash the relay, make its memory grow, or cause it to send more than it receives (docs/decisions.md,
22). After each burst, a client with an allocation sends a request and waits for the response. This shows that the relay
has processed the burst and still serves its clients. With --requests, the flood consists of valid requests only, most
of them smaller than their response.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method
from tests.service.relay_process import REALM, USER, RelayProcess, TurnClient, code_of

BURST = 256  # datagrams that fit into the smallest receive buffer
SENDERS = 400
_WARM_UP = 0.1  # the fraction of the flood before memory is first measured
_POOL = 4096
_UDP_SEGMENT = 103  # <linux/udp.h>


@attrs.frozen
class Outcome:
    """Bytes are payload bytes. Memory is the total of all processes of the relay."""

    datagrams: int
    seconds: float
    bytes_in: int
    bytes_out: int
    answers: int
    grown: int
    """The growth of resident memory in bytes, after the first tenth of the flood."""
    peak: int


def flood(relay: RelayProcess, count: int, *, seed: int = 0, requests_only: bool = False) -> Outcome:
    """Send `count` datagrams to a running relay that allows allocations on 127.0.0.1.

    Raises: AssertionError, if the relay stops serving its clients.
    """
    randomness = random.Random(seed)
    witnesses = _witnesses(relay)
    relayed = witnesses[0].allocated
    pool = [randomness.choice(_REQUESTS if requests_only else _HOSTILE)(randomness) for _ in range(_POOL)]
    if not requests_only:
        pool[0] = _huge(randomness)
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(_sender(number)) for number in range(SENDERS)]
        poll = stack.enter_context(contextlib.closing(select.epoll()))
        for sender in senders:
            poll.register(sender.fileno(), select.EPOLLIN)
        by_descriptor = {sender.fileno(): sender for sender in senders}
        targets = [SocketAddress("127.0.0.1", relay.port)] * 7 + ([] if requests_only else [relayed])
        sent = bytes_in = bytes_out = answers = settled = 0
        began = time.monotonic()
        while sent < count:
            for _ in range(min(BURST, count - sent)):
                bytes_in += _send(randomness, senders, pool, randomness.choice(targets))
                sent += 1
            for witness in witnesses:
                witness.refresh()
            for descriptor, _ in poll.poll(0):
                for answer in _received(by_descriptor[descriptor]):
                    answers += 1
                    bytes_out += answer
            if not settled and sent >= count * _WARM_UP:
                settled = _resident_bytes(relay)
        seconds = time.monotonic() - began
    now = _resident_bytes(relay)
    return Outcome(sent, seconds, bytes_in, bytes_out, answers, grown=now - settled, peak=now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--requests", action="store_true", help="send only requests that get a response")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        relay = RelayProcess(Path(directory), "--workers", str(options.workers), *QUIET)
        with contextlib.closing(relay):
            relay.wait_ready()
            outcome = flood(relay, options.count, seed=options.seed, requests_only=options.requests)
            relay.signal()
            code = relay.wait(20)
    print(f"datagrams         {outcome.datagrams:>14,}  ({outcome.datagrams / outcome.seconds:,.0f}/s)")
    print(f"bytes in          {outcome.bytes_in:>14,}")
    print(f"bytes out         {outcome.bytes_out:>14,}  ({outcome.bytes_out / outcome.bytes_in:.1%})")
    print(f"responses         {outcome.answers:>14,}")
    print(f"memory at the end {outcome.peak / 1e6:>14.1f}  MB")
    print(f"memory growth     {outcome.grown / 1e6:>14.1f}  MB")
    print(f"exit code         {code:>14}")


QUIET = ("--log-level", "info", "--log-format", "json", "--drain-time", "0s")


class _Witness:
    """A client with an allocation."""

    def __init__(self, relay: RelayProcess) -> None:
        self._client = TurnClient(relay.port)
        (self.allocated,) = self._client.allocate().get_all(stun.XOR_RELAYED_ADDRESS)

    def refresh(self) -> None:
        """Wait until the relay has processed all earlier datagrams: it reads its socket in order."""
        assert code_of(self._client.request(Method.REFRESH)) == 0


def _witnesses(relay: RelayProcess) -> list[_Witness]:
    """Enough clients that most probably each worker has one."""
    workers = max(1, len(relay.events("relay:worker_started")))
    return [_Witness(relay) for _ in range(1 if workers == 1 else 6 * workers)]


def _sender(number: int) -> socket.socket:
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sender.bind((f"127.2.{number // 250}.{number % 250 + 1}", 0))
    return sender


def _send(
    randomness: random.Random, senders: Sequence[socket.socket], pool: Sequence[bytes], target: SocketAddress
) -> int:
    """Send a random datagram, in some cases segmented into a batch. Returns the bytes sent."""
    data = pool[randomness.randrange(_POOL)]
    ancillary = []
    if len(data) > 64 and not randomness.randrange(8):
        size = randomness.randrange(max(24, len(data) // 60 + 1), len(data))
        ancillary.append((socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("=H", min(size, 1400))))
    with contextlib.suppress(OSError):  # the kernel refuses this segmentation
        return senders[randomness.randrange(SENDERS)].sendmsg((data,), ancillary, 0, target)
    return 0


def _received(sender: socket.socket) -> Iterator[int]:
    with contextlib.suppress(BlockingIOError):
        while True:
            yield len(sender.recv(65_536))


def _resident_bytes(relay: RelayProcess) -> int:
    pids = [relay.process.pid, *(event["pid"] for event in relay.events("relay:worker_started"))]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


# Kinds of datagrams.


def _noise(randomness: random.Random) -> bytes:
    return randomness.randbytes(randomness.choice((0, 1, 3, 4, 19, 20, 21, 200, 1400)))


def _huge(randomness: random.Random) -> bytes:
    return bytes((randomness.randrange(256),)) * 60_000


def _binding(randomness: random.Random) -> bytes:
    return Message(Method.BINDING, Kind.REQUEST, randomness.randbytes(12)).encode()


def _bare_allocate(randomness: random.Random) -> bytes:
    attributes = ((stun.REQUESTED_TRANSPORT, stun.UDP),)
    return Message(Method.ALLOCATE, Kind.REQUEST, randomness.randbytes(12), attributes).encode()


def _named_refresh(randomness: random.Random) -> bytes:
    attributes = ((stun.USERNAME, randomness.choice((USER, "a", "2000000000:salt"))),)
    return Message(Method.REFRESH, Kind.REQUEST, randomness.randbytes(12), attributes).encode()


def _forged(randomness: random.Random) -> bytes:
    """A request in a user's name with an invalid key and nonce."""
    attributes = (
        (stun.REQUESTED_TRANSPORT, stun.UDP),
        (stun.LIFETIME, 0),
        (stun.CHANNEL_NUMBER, 0x4000),
        (stun.XOR_PEER_ADDRESS, SocketAddress("127.0.0.1", 22)),
        (stun.USERNAME, USER),
        (stun.REALM, REALM),
        (stun.NONCE, "A" * 24),
    )
    method = randomness.choice((Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND))
    message = Message(method, Kind.REQUEST, randomness.randbytes(12), attributes)
    return message.encode(key=randomness.randbytes(16), fingerprint=bool(randomness.randrange(2)))


def _mutilated(randomness: random.Random) -> bytes:
    data = bytearray(_forged(randomness))
    for _ in range(randomness.randrange(1, 6)):
        data[randomness.randrange(len(data))] = randomness.randrange(256)
    return bytes(data[: randomness.randrange(1, len(data) + 1)])


def _unasked(randomness: random.Random) -> bytes:
    """Responses and indications."""
    kind = randomness.choice((Kind.SUCCESS, Kind.ERROR, Kind.INDICATION))
    attributes = ((stun.XOR_PEER_ADDRESS, SocketAddress("127.0.0.1", 22)), (stun.DATA, randomness.randbytes(99)))
    return Message(randomness.choice(list(Method)), kind, randomness.randbytes(12), attributes).encode()


def _channel_data(randomness: random.Random) -> bytes:
    size = randomness.choice((0, 1, 100, 1312))
    return struct.pack("!HH", randomness.randrange(0x4000, 0x8000), randomness.choice((size, 0xFFFF))) + bytes(size)


def _row_of_channel_data(randomness: random.Random) -> bytes:
    return struct.pack("!HH", 0x4000, 96) * 20 + bytes(100)


_REQUESTS = (_binding, _bare_allocate, _named_refresh)
_HOSTILE = (
    *_REQUESTS,
    *(_noise, _noise, _forged, _forged, _mutilated, _mutilated, _unasked, _channel_data, _row_of_channel_data),
)


if __name__ == "__main__":
    main()
