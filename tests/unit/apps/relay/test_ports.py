"""How an allocation's socket answers each way in which a send can fail, on a socket that fails on demand."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from firezone_tunnel.apps.relay import ports as relay_ports
from firezone_tunnel.apps.relay.ports import AllocationPort, AllocationPorts
from firezone_tunnel.core.datagrams import receive_buffer
from firezone_tunnel.core.relay.outputs import RelayTransmit
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.shell.udp.segmented import RETRY_SEGMENTATION_AFTER

PEER = SocketAddress("8.8.8.8", 1)


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> End:
    return End(monkeypatch)


def test_a_batch_is_one_send(end: End) -> None:
    end.send(25, segment_size=10)

    assert end.sent == [(25, True)]


@pytest.mark.parametrize("refusal", [errno.EMSGSIZE, errno.EINVAL, errno.EIO])
def test_a_batch_whose_segmentation_is_refused_leaves_at_once_singly_and_so_do_others_for_ten_minutes(
    end: End, refusal: int
) -> None:
    end.refuse_segments = refusal
    end.send(25, segment_size=10)
    assert end.sent == [(10, False), (10, False), (5, False)]
    assert end.ports.counters.segmentation_refused == 1
    end.refuse_segments = None

    end.send(20, segment_size=10)
    assert end.sent[3:] == [(10, False), (10, False)]
    end.now += RETRY_SEGMENTATION_AFTER
    end.send(20, segment_size=10)
    assert end.sent[5:] == [(20, True)]


def test_segmentation_stays_on_if_everything_is_refused(end: End) -> None:
    end.refuse_segments = end.refuse_all = errno.EINVAL
    end.send(20, segment_size=10)
    end.refuse_segments = end.refuse_all = None

    end.send(20, segment_size=10)

    assert end.sent == [(20, True)]
    assert end.ports.counters.segmentation_refused == 0


@pytest.mark.parametrize(
    ("failure", "counter"),
    [
        (errno.EAGAIN, "blocked"),
        (errno.EHOSTUNREACH, "unreachable"),
        (errno.EPERM, "forbidden"),
        (errno.ENOBUFS, "no_buffers"),
        (errno.ECONNREFUSED, "send_errors"),
    ],
)
@pytest.mark.parametrize("segment_size", [0, 10])
def test_a_failed_send_is_counted_and_the_transmit_released(
    end: End, failure: int, counter: str, segment_size: int
) -> None:
    end.refuse_all = failure

    end.send(20, segment_size=segment_size)

    assert getattr(end.ports.counters, counter) == 1
    assert end.released == 1
    assert end.sent == []


def test_transmits_for_a_closed_port_are_released(end: End) -> None:
    end.port.close()

    end.send(20)

    assert (end.sent, end.released) == ([], 1)
    assert len(end.ports) == 0


class End:
    """The socket of an allocation on port 50000; (size, whether in segments) of what it has `sent`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.sent: list[tuple[int, bool]] = []
        self.released = 0
        self.refuse_segments: int | None = None
        self.refuse_all: int | None = None
        monkeypatch.setattr(relay_ports, "boottime", lambda: self.now)
        self.ports = AllocationPorts(self, {1: "127.0.0.1"}, receive_buffer(), _never, _never)
        self.port = AllocationPort(self.ports, self, 50_000, is_ipv6=False)
        self.ports._ports[50_000, False] = self.port

    def send(self, size: int, *, segment_size: int = 0) -> None:
        self.ports.send(RelayTransmit(PEER, bytes(size), port=50_000, segment_size=segment_size, pooled=self))

    def release(self) -> None:
        self.released += 1

    # What the reactor and the socket are asked to do.

    def addReader(self, reader: object) -> None:
        pass

    removeReader = addReader

    def close(self) -> None:
        pass

    def sendmsg(self, buffers: tuple[bytes], ancillary: list[Any], flags: int, destination: SocketAddress) -> None:
        assert destination == PEER
        refusal = (self.refuse_segments if ancillary else None) or self.refuse_all
        if refusal is not None:
            raise OSError(refusal, "as demanded")
        self.sent.append((len(buffers[0]), bool(ancillary)))


def _never(*arguments: object) -> None:
    raise AssertionError(arguments)
