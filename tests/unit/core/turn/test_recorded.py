"""Recorded sessions of upstream's programs: our client sends the same requests, and understands the answers.

The recorded transaction ids are our entropy. So our requests can be compared byte by byte, once they carry the
SOFTWARE of the recording, and the relay's recorded answers are answers to ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import pytest

from firezone_tunnel.core.ice.candidate import CandidateKind
from firezone_tunnel.core.packet.layout import Rows
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, long_term_key
from firezone_tunnel.core.turn.allocation import Allocation
from firezone_tunnel.core.turn.channel_data import HEADER, encode_channel_data, parse_channel_data
from firezone_tunnel.core.turn.events import CandidateFound

_DATA = Path(__file__).parents[3] / "data" / "vectors"
_RELAY = SocketAddress("10.99.0.1", 3478)
_SESSIONS = [(age, peer) for age in ("v1", "v2") for peer in ("client", "gateway")]


class Datagram(NamedTuple):
    at: float
    is_out: bool
    data: bytes


class Recording:
    """The datagrams between one host and the relay, in order."""

    def __init__(self, age: str, peer: str) -> None:
        self.host = SocketAddress({"client": "10.20.1.1", "gateway": "10.20.2.1"}[peer], 52625)
        self.datagrams: list[Datagram] = []
        with (_DATA / f"{age}-relayed.jsonl").open() as lines:
            for line in lines:
                row = json.loads(line)
                if row["at"] == "portal" and row["peer"] == peer and row.get("frame", {}).get("event") == "init":
                    (relay,) = row["frame"]["payload"]["relays"]
                    self.username, self.password = relay["username"], relay["password"]
                elif row["at"] == peer and str(_RELAY) in {row.get("src"), row.get("dst")}:
                    for data in _datagrams(bytes.fromhex(row["data"])):
                        self.datagrams.append(Datagram(row["t"], row["dir"] == "out", data))
        self.key = long_term_key(self.username, "firezone", self.password)

    def messages(self) -> Iterator[tuple[Datagram, Message]]:
        for datagram in self.datagrams:
            if datagram.data[0] < 4:
                message = stun.parse(datagram.data)
                assert message is not None, datagram
                yield datagram, message

    def requests(self) -> list[Message]:
        return [message for _, message in self.messages() if message.kind is Kind.REQUEST]


@pytest.mark.parametrize(("age", "peer"), _SESSIONS)
def test_every_message_is_read_verified_and_written_as_it_was(age: str, peer: str) -> None:
    recording = Recording(age, peer)
    seen = []
    for datagram, message in recording.messages():
        seen.append((message.method, message.kind))
        if message.method == Method.BINDING:
            assert not message.has_integrity
            assert message.encode() == datagram.data
        else:
            assert message.is_authentic(recording.key)
            assert message.encode(key=recording.key) == datagram.data

    assert seen[:6] == [
        (Method.BINDING, Kind.REQUEST),
        (Method.BINDING, Kind.SUCCESS),
        (Method.ALLOCATE, Kind.REQUEST),
        (Method.ALLOCATE, Kind.ERROR),
        (Method.ALLOCATE, Kind.REQUEST),
        (Method.ALLOCATE, Kind.SUCCESS),
    ]
    assert seen.count((Method.CHANNEL_BIND, Kind.SUCCESS)) >= 2


@pytest.mark.parametrize(("age", "peer"), _SESSIONS)
def test_every_channel_data_datagram_is_read_and_written_as_it_was(age: str, peer: str) -> None:
    datagrams = [datagram.data for datagram in Recording(age, peer).datagrams if 64 <= datagram.data[0] <= 79]

    assert len(datagrams) > 20
    for datagram in datagrams:
        data = parse_channel_data(Rows.single(memoryview(datagram)), exact=True)
        assert data is not None
        assert data.number in {0x4000, 0x4001}
        assert encode_channel_data(data.number, data.payloads.row(0)) == datagram


@pytest.mark.parametrize(("age", "peer"), _SESSIONS)
def test_our_client_sends_the_same_and_reaches_the_same_state(age: str, peer: str) -> None:
    recording = Recording(age, peer)
    replay = Replay(recording, pushes_keepalives_back=age == "v2")
    replay.run()

    granted = next(message for _, message in recording.messages() if message.get(stun.XOR_RELAYED_ADDRESS))
    peers = [
        request.get(stun.XOR_PEER_ADDRESS) for request in recording.requests() if request.method == Method.CHANNEL_BIND
    ]
    allocation = replay.allocation
    assert replay.compared == len(recording.requests())
    assert allocation.relayed(False) == granted.get(stun.XOR_RELAYED_ADDRESS)
    assert allocation.relayed(True) is None
    assert allocation.active_socket == _RELAY
    assert [allocation.channel_to(address, replay.now) for address in peers if address] == [0x4000, 0x4001]
    assert replay.received_from <= set(peers)
    assert len(replay.received_from) == 2
    assert [(found.kind, found.address) for found in replay.found] == [
        (CandidateKind.HOST, recording.host),
        (CandidateKind.SERVER_REFLEXIVE, recording.host),
        (CandidateKind.RELAYED, granted.get(stun.XOR_RELAYED_ADDRESS)),
    ]
    assert allocation.counters.unauthentic == allocation.counters.unexpected == 0


class Replay:
    """Our allocation, fed with the answers of a recording."""

    def __init__(self, recording: Recording, *, pushes_keepalives_back: bool) -> None:
        self.recording = recording
        self.now = recording.datagrams[0].at
        self.compared = 0
        self.received_from: set[SocketAddress | None] = set()
        self.found: list[Any] = []
        self._pushes_keepalives_back = pushes_keepalives_back
        self._ids = iter([request.transaction_id for request in recording.requests()])
        self._sent: list[Message] = []
        self.allocation = Allocation(
            "relay",
            ipv4=_RELAY,
            ipv6=None,
            username=recording.username,
            password=recording.password,
            entropy=lambda size: next(self._ids),
            now=self.now,
        )

    def run(self) -> None:
        for datagram in self.recording.datagrams:
            self.now = datagram.at
            timeout = self.allocation.next_timeout()
            if timeout is not None and timeout.at <= self.now:
                self.allocation.handle_timeout(self.now)
            if datagram.data[0] >= 4:
                self._channel_data(datagram)
            elif datagram.is_out:
                self._compare(datagram.data)
            else:
                message = stun.parse(datagram.data)
                assert message is not None
                assert self.allocation.handle_message(message, _RELAY, self.recording.host, self.now)
            self._drain()
        assert self._sent == [], "nothing beyond what upstream sent"

    def _compare(self, recorded: bytes) -> None:
        theirs = stun.parse(recorded)
        assert theirs is not None
        if theirs.method == Method.CHANNEL_BIND:
            peer = theirs.get(stun.XOR_PEER_ADDRESS)
            assert peer is not None
            self.allocation.bind_channel(peer, self.now)
        self._drain()
        ours = self._sent.pop(0)
        software = theirs.get(stun.SOFTWARE)
        attributes = tuple(
            (attribute, software if attribute == stun.SOFTWARE else value) for attribute, value in ours.attributes
        )
        key = self.recording.key if ours.has_integrity else None
        assert attrs.evolve(ours, attributes=attributes).encode(key=key) == recorded
        self.compared += 1

    def _channel_data(self, datagram: Datagram) -> None:
        channel, _ = HEADER.unpack_from(datagram.data)
        if datagram.is_out:
            if self._pushes_keepalives_back:
                self.allocation.sent_channel_data(self.now)
        else:
            peer = self.allocation.peer_of(channel, self.now)
            assert peer is not None
            self.received_from.add(peer)

    def _drain(self) -> None:
        for transmit in self.allocation.transmits():
            assert transmit.destination == _RELAY
            message = stun.parse(transmit.payload)
            assert message is not None
            self._sent.append(message)
        for event in self.allocation.events():
            assert isinstance(event, CandidateFound)
            self.found.append(event.candidate)


def _datagrams(data: bytes) -> Iterator[bytes]:
    """The messages of a batch (UDP_SEGMENT), which was recorded in one piece."""
    while data:
        length = int.from_bytes(data[2:4], "big") + (20 if data[0] < 4 else 4)
        yield data[:length]
        data = data[length:]
