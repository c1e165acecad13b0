"""The steps of the packet path, each measured separately."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.core.datagrams import receive_buffer
from firezone_tunnel.core.packet.coalesce import Arena, coalesce, coalesce_lone
from firezone_tunnel.core.packet.layout import Rows
from firezone_tunnel.core.packet.superpacket import (
    SuperPacket,
    from_virtio,
    parse,
    set_lengths,
    set_partial_checksum,
    virtio_header,
)
from firezone_tunnel.core.wireguard.open import Opener
from firezone_tunnel.core.wireguard.seal import SealBuffer, plan, seal_pool

SEGMENT_SIZE = 1228  # MTU 1280 less IPv4 and TCP headers with timestamps
SEGMENTS = 52
CALLS = 100


class Case(NamedTuple):
    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    """Called before each round of CALLS calls. It is not timed."""


def step_cases() -> Iterator[Case]:
    cipher = ChaCha20Poly1305(bytes(32))
    packet = super_packet()
    frame = memoryview(bytearray(virtio_header(packet) + packet.data))
    yield Case("parse", lambda: from_virtio(frame))
    yield Case("AEAD, seal", aead(cipher.encrypt_into))
    yield from seal_cases(cipher, packet)
    yield from open_cases(cipher, packet)
    yield from lone_cases(cipher, packet)


def aead(encrypt_into: Callable[..., object]) -> Callable[[], object]:
    view = memoryview(bytearray(SEGMENTS * 1312))
    nonce = memoryview(bytearray(12))
    jobs = [(nonce, view[at + 16 : at + 1296], view[at + 16 : at + 1312]) for at in range(0, len(view), 1312)]

    def run() -> None:
        for nonce, packet, sealed in jobs:
            encrypt_into(nonce, packet, None, sealed)

    return run


def seal_cases(cipher: ChaCha20Poly1305, packet: SuperPacket) -> Iterator[Case]:
    sends = [(first, count, seal_buffer()) for first, count in plan(packet)]

    def seal(cipher: Any) -> None:
        for first, count, buffer in sends:
            buffer.seal(cipher, 1, first, packet, first_segment=first, count=count)

    yield Case(f"seal ({len(sends)} sends)", lambda: seal(cipher))
    yield Case("seal, all but the AEAD", lambda: seal(NoCipher))


def open_cases(cipher: ChaCha20Poly1305, packet: SuperPacket) -> Iterator[Case]:
    received = []
    for first, count in plan(packet):
        datagrams, size = seal_buffer().seal(cipher, 1, first, packet, first_segment=first, count=count)
        received.append((Rows.segments(receive_buffer(), len(datagrams), size), bytes(datagrams)))
    arena = Arena()
    opener = Opener()

    def open_all(cipher: Any) -> list[Rows]:
        batches = []
        for messages, datagrams in received:
            messages.memory[: len(datagrams)] = datagrams
            assert opener.common_receiver(messages) == 1
            opened = opener.open(cipher, messages, 0, messages.count)
            assert b"\0" not in opened.authentic.tobytes()
            batches.append(opened.packets)
        return batches

    def merge(batches: list[Rows]) -> None:
        arena.reset()
        for packets in batches:
            assert len(coalesce(packets, arena=arena)) == 1

    yield Case("open", lambda: open_all(cipher))
    yield Case("open, all but the AEAD", lambda: open_all(NoCipher))
    opened = open_all(cipher)
    yield Case("coalesce", lambda: merge(opened))
    yield Case("open + coalesce", lambda: merge(open_all(cipher)))


def lone_cases(cipher: ChaCha20Poly1305, packet: SuperPacket) -> Iterator[Case]:
    segments = [packet.segment(index) for index in range(SEGMENTS)]
    partial = [segment.copy() for segment in segments]
    for segment in partial:
        set_partial_checksum(segment)
    frames = [memoryview(bytearray(virtio_header(segment) + segment.data)) for segment in partial]
    bare = [acknowledgement(packet) for _ in range(SEGMENTS)]
    buffer = seal_buffer()
    arena = Arena()

    def merge(packets: list[SuperPacket]) -> None:
        arena.reset()
        assert len(coalesce_lone(packets, arena)) == 1

    yield Case(f"{SEGMENTS} lone packets: parse", lambda: [from_virtio(frame) for frame in frames])
    yield Case(f"{SEGMENTS} lone packets: coalesce", lambda: merge(partial))
    yield Case(f"{SEGMENTS} lone, full checksums: coalesce", lambda: merge(segments))
    yield Case(f"{SEGMENTS} bare ACKs: coalesce", lambda: coalesce_lone(bare, arena))
    yield Case(f"{SEGMENTS} bare ACKs: seal", lambda: buffer.seal_lone(cipher, 1, 0, bare))


def seal_buffer() -> SealBuffer:
    buffer = seal_pool(1).borrow()
    assert buffer is not None
    return buffer


def super_packet(
    source: str = "10.0.0.1", destination: str = "10.0.0.2", source_port: int = 49152, destination_port: int = 5000
) -> SuperPacket:
    header = bytearray.fromhex(
        "4500ffff00004000400600000a0000010a000002"  # IPv4, DF
        "c000138800000001000000028010ffff00000000"  # TCP, ACK
        "0101080a0000000100000002"  # timestamps
    )
    header[12:20] = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    header[20:24] = source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
    data = bytearray(header[:2] + b"\0\0" + header[4:] + bytes(range(256)) * 300)
    del data[len(header) + SEGMENTS * SEGMENT_SIZE :]
    data[2:4] = len(data).to_bytes(2, "big")
    packet = parse(data, segment_size=SEGMENT_SIZE)
    assert packet is not None
    set_lengths(packet)
    set_partial_checksum(packet)
    return packet


def acknowledgement(packet: SuperPacket) -> SuperPacket:
    bare = packet.with_data(memoryview(bytearray(packet.data[: packet.header_length])))
    bare.segment_size = 0
    set_lengths(bare)
    set_partial_checksum(bare)
    bare.complete()
    return bare


class NoCipher:
    """A cipher that neither encrypts nor authenticates, to measure the cost of everything else."""

    @staticmethod
    def encrypt_into(nonce: object, packet: object, associated: object, sealed: object) -> None: ...

    @staticmethod
    def decrypt_into(nonce: object, sealed: object, associated: object, packet: object) -> None: ...
