"""Control messages that client and gateway send each other inside the tunnel (docs/protocol/data-plane.md, 5).

A message is an IPv6 packet with next header 0xFF, hop limit 0, and `::` as source and destination. Its payload: the
event (u8), seven reserved bytes, then JSON. Nothing is acknowledged, so every event may come twice or never.
"""

from __future__ import annotations

import struct

import attrs
import msgspec

from firezone_tunnel.core.packet.superpacket import SuperPacket

NEXT_HEADER = 0xFF


@attrs.frozen
class AssignedIps:
    """The client gave these proxy addresses to a domain of a DNS resource."""

    resource: str
    domain: str
    proxy_ips: tuple[str, ...]


@attrs.frozen
class DomainStatus:
    """Whether the gateway now translates the proxy addresses of a domain."""

    resource: str
    domain: str
    active: bool


@attrs.frozen
class Goodbye:
    """The sender has closed the connection on purpose."""


Event = AssignedIps | DomainStatus | Goodbye


def is_control(packet: SuperPacket) -> bool:
    """Whether a packet is for the other side itself, well-formed or not. It must never reach a TUN device."""
    return packet.protocol == NEXT_HEADER and packet.version == 6 and packet.source == _NOBODY == packet.destination


def decode(packet: SuperPacket) -> Event | None:
    """The event of a control packet; None for one that we don't know, or that is malformed."""
    payload = bytes(packet.data[packet.transport_offset :])
    if len(payload) < _HEADER_SIZE:
        return None
    try:
        match payload[0]:
            case _Code.ASSIGNED_IPS:
                assigned = msgspec.json.decode(payload[_HEADER_SIZE:], type=_AssignedIps)
                return AssignedIps(assigned.resource, assigned.domain, tuple(assigned.proxy_ips))
            case _Code.DOMAIN_STATUS:
                status = msgspec.json.decode(payload[_HEADER_SIZE:], type=_DomainStatus)
                return DomainStatus(status.resource, status.domain, active=status.status == _ACTIVE)
            case _Code.GOODBYE:
                return Goodbye()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # a packet holds enough brackets for the last
        return None
    return None


def encode(event: Event) -> bytes:
    """The whole IPv6 packet of an event."""
    match event:
        case AssignedIps():
            proxy_ips = list(event.proxy_ips)
            return _packet(_Code.ASSIGNED_IPS, _AssignedIps(event.resource, event.domain, proxy_ips))
        case DomainStatus():
            status = _ACTIVE if event.active else _INACTIVE
            return _packet(_Code.DOMAIN_STATUS, _DomainStatus(event.resource, event.domain, status))
        case Goodbye():
            return _packet(_Code.GOODBYE, None)


class _Code:
    ASSIGNED_IPS = 0
    DOMAIN_STATUS = 1
    GOODBYE = 2


class _AssignedIps(msgspec.Struct):
    resource: str
    domain: str
    proxy_ips: list[str]


class _DomainStatus(msgspec.Struct):
    resource: str
    domain: str
    status: str


_NOBODY = bytes(16)
_ACTIVE = "Active"  # whatever else a peer says means that it is not
_INACTIVE = "Inactive"
_HEADER_SIZE = 8
_IPV6 = struct.Struct(">IHBB16s16s")
"""version, traffic class and flow label; payload length, next header, hop limit, addresses."""


def _packet(code: int, body: msgspec.Struct | None) -> bytes:
    payload = bytes((code,)).ljust(_HEADER_SIZE, b"\0") + (msgspec.json.encode(body) if body is not None else b"")
    return _IPV6.pack(6 << 28, len(payload), NEXT_HEADER, 0, _NOBODY, _NOBODY) + payload
