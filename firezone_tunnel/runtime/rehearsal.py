"""A lone packet's way through the process, gone without a packet, so that its code is in the processor's caches."""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.packet.superpacket import VIRTIO_HEADER_SIZE, from_virtio, parse
from firezone_tunnel.wireguard.seal import ReceiveBuffer, seal_message

_NO_KEY = ChaCha20Poly1305(bytes(32))  # protects nothing: what it seals is thrown away
_PACKET = bytes.fromhex("45000054000140004001722564400001644000020800f7f700070001") + bytes(56)  # a ping
_FRAME = memoryview(bytearray(bytes(VIRTIO_HEADER_SIZE) + _PACKET))
_BUFFER = ReceiveBuffer(2048)


def rehearse() -> None:
    """Parse a packet, seal it, open it again and parse that. Takes 4 µs where the caches are warm."""
    packet = from_virtio(_FRAME)
    assert packet is not None
    sealed = seal_message(_NO_KEY, 0, 0, bytes(packet.data))
    _BUFFER.view[: len(sealed)] = sealed
    opened, _ = _BUFFER.open_lone(_NO_KEY, length=len(sealed))
    parse(opened)
