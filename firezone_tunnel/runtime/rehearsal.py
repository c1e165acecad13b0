"""A lone packet's way through the process, gone without a packet, so that its code is in the processor's caches."""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.packet.superpacket import VIRTIO_HEADER_SIZE, from_virtio
from firezone_tunnel.wireguard.seal import HEADER_SIZE, seal_message

_NO_KEY = ChaCha20Poly1305(bytes(32))  # protects nothing: what it seals is thrown away
_PACKET = bytes.fromhex("45000054000140004001722564400001644000020800f7f700070001") + bytes(56)  # a ping
_FRAME = memoryview(bytearray(bytes(VIRTIO_HEADER_SIZE) + _PACKET))


def rehearse() -> None:
    """Parse a packet, seal it and open it again. Takes 3 µs where the caches are warm."""
    packet = from_virtio(_FRAME)
    assert packet is not None
    sealed = seal_message(_NO_KEY, 0, 0, bytes(packet.data))
    _NO_KEY.decrypt(bytes(12), sealed[HEADER_SIZE:], None)
