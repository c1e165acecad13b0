"""ICE candidates: addresses of a peer, their priorities, and their text form for signalling through the portal.

Sources: RFC 8445, section 5.1; docs/protocol/data-plane.md, 2.4.5, 2.4.6 and 12.1.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress

import attrs

from firezone_tunnel.core.sansio import SocketAddress

MAX_SDP_LENGTH = 512
_PREFIX = "candidate:"
_COMPONENT = 1
_UNSPECIFIED = {False: SocketAddress("0.0.0.0", 0), True: SocketAddress("::", 0)}


class CandidateKind(enum.Enum):
    """The type of a candidate. The values are used in its text form."""

    HOST = "host"
    SERVER_REFLEXIVE = "srflx"
    PEER_REFLEXIVE = "prflx"
    RELAYED = "relay"


_TYPE_PREFERENCE = {  # docs/protocol/data-plane.md, 2.4.6: upstream uses 2 for relays, the RFC recommends 0
    CandidateKind.HOST: 126,
    CandidateKind.PEER_REFLEXIVE: 110,
    CandidateKind.SERVER_REFLEXIVE: 100,
    CandidateKind.RELAYED: 2,
}
_LOCAL_PREFERENCE = {
    CandidateKind.HOST: 65535,
    CandidateKind.PEER_REFLEXIVE: 49151,
    CandidateKind.SERVER_REFLEXIVE: 32767,
    CandidateKind.RELAYED: 16383,
}
_IPV4_PENALTY = 1
_OTHER_FAMILY_PENALTY = 1000
_STEP = 2  # between candidates of one kind and family

Identity = tuple[CandidateKind, SocketAddress, SocketAddress | None]
"""See `Candidate.identity`."""


@attrs.frozen
class Candidate:
    """A transport address at which a peer can be reached: `address`, as seen by others.

    `base` is the address that its owner sends from: the local socket's address, or the relayed address itself. For a
    remote candidate it is unknown and set to `address`. `related` is only used in signalling (raddr, rport).
    """

    kind: CandidateKind
    address: SocketAddress
    base: SocketAddress
    priority: int
    foundation: str
    related: SocketAddress | None = None
    ufrag: str | None = None

    @classmethod
    def host(cls, address: SocketAddress) -> Candidate:
        """A local socket's own address."""
        return _local(CandidateKind.HOST, address, address)

    @classmethod
    def server_reflexive(cls, address: SocketAddress, base: SocketAddress) -> Candidate:
        """The address of the socket `base` as seen by a relay."""
        return _local(CandidateKind.SERVER_REFLEXIVE, address, base)

    @classmethod
    def relayed(cls, address: SocketAddress, *, other_family: bool = False) -> Candidate:
        """An address at a relay. `other_family`: the relay is reached over the other IP version than `address`."""
        return _local(CandidateKind.RELAYED, address, address, penalty=_OTHER_FAMILY_PENALTY * other_family)

    @classmethod
    def peer_reflexive(cls, address: SocketAddress, priority: int) -> Candidate:
        """A remote address learned from a received check, with the `priority` given in the check."""
        foundation = _foundation(CandidateKind.PEER_REFLEXIVE, address, priority)
        return cls(CandidateKind.PEER_REFLEXIVE, address, address, priority, foundation)

    def lowered(self) -> Candidate:
        """The same candidate with the priority lowered by one step, for a further candidate of its kind and family."""
        priority = self.priority - (_STEP << 8)
        return attrs.evolve(self, priority=priority, foundation=_foundation(self.kind, self.base, priority))

    @property
    def reflexive_priority(self) -> int:
        """The value of PRIORITY in a check: this candidate's priority if it were peer-reflexive.

        See docs/protocol/data-plane.md, 2.5.1.
        """
        return _TYPE_PREFERENCE[CandidateKind.PEER_REFLEXIVE] << 24 | self.priority & 0xFFFFFF

    @property
    def identity(self) -> Identity:
        """The fields by which an invalidation identifies a candidate (docs/protocol/data-plane.md, 2.4.7)."""
        return self.kind, self.address, self.related

    def to_sdp(self) -> str:
        """The text form sent through the portal, as upstream writes it (docs/protocol/data-plane.md, 2.4.5)."""
        text = (
            f"{_PREFIX}{self.foundation} {_COMPONENT} udp {self.priority}"
            f" {self.address.host} {self.address.port} typ {self.kind.value}"
        )
        if self.related is not None:
            text += f" raddr {self.related.host} rport {self.related.port}"
        return text if self.ufrag is None else f"{text} ufrag {self.ufrag}"


def parse_sdp(text: str) -> Candidate | None:
    """Parse a remote candidate in either protocol generation's format. Returns None if it is unusable; never raises.

    Attributes after the kind come in pairs and in any order. Unknown attributes are ignored.
    """
    if len(text) > MAX_SDP_LENGTH or not text.isascii():
        return None
    fields = text.removeprefix("a=").split(" ")
    if len(fields) < 8 or not fields[0].startswith(_PREFIX) or fields[6] != "typ":
        return None
    foundation = fields[0].removeprefix(_PREFIX)
    extensions = dict(zip(fields[8::2], fields[9::2], strict=False))
    try:
        kind = CandidateKind(fields[7])
        address = _address(fields[4], fields[5])
        related = _address(extensions["raddr"], extensions.get("rport", "0")) if "raddr" in extensions else None
        priority = _decimal(fields[3], maximum=0xFFFFFFFF)
    except ValueError:
        return None
    if fields[1] != str(_COMPONENT) or fields[2].lower() != "udp" or not foundation or not is_usable(address):
        return None
    return Candidate(kind, address, address, priority, foundation, related, extensions.get("ufrag"))


def candidate_priority(kind: CandidateKind, local_preference: int) -> int:
    """The priority of a candidate of component 1, the only component (RFC 8445, section 5.1.2.1)."""
    return _TYPE_PREFERENCE[kind] << 24 | local_preference << 8 | 256 - _COMPONENT


def pair_priority(controlling: int, controlled: int) -> int:
    """The priority of a pair, from the priorities of its two candidates (RFC 8445, section 6.1.2.3)."""
    return (min(controlling, controlled) << 32) + 2 * max(controlling, controlled) + (controlling > controlled)


def is_usable(address: SocketAddress) -> bool:
    """Whether a candidate may have this address. Loopback is allowed, port 0 is not.

    See docs/protocol/data-plane.md, 2.4.5.
    """
    if address.port == 0:
        return False
    ip = ipaddress.ip_address(address.host)
    if ip.is_multicast or ip.is_unspecified:
        return False
    return ip.version == 6 or not (ip.is_link_local or address.host == "255.255.255.255")


def _local(kind: CandidateKind, address: SocketAddress, base: SocketAddress, penalty: int = 0) -> Candidate:
    preference = _LOCAL_PREFERENCE[kind] - penalty - (0 if address.is_ipv6 else _IPV4_PENALTY)
    priority = candidate_priority(kind, preference)
    # Like upstream, don't reveal the base of a reflexive or relayed candidate: the peer doesn't need it.
    related = None if kind is CandidateKind.HOST else _UNSPECIFIED[address.is_ipv6]
    return Candidate(kind, address, base, priority, _foundation(kind, base, priority), related)


def _foundation(kind: CandidateKind, base: SocketAddress, priority: int) -> str:
    """24 hex digits: the priority as upstream writes it, least significant byte first, then a hash of kind and base."""
    digest = hashlib.blake2s(f"{kind.value} {base.host}".encode(), digest_size=8).hexdigest()
    return priority.to_bytes(4, "little").hex() + digest


def _address(host: str, port: str) -> SocketAddress:
    if "%" in host:  # a scope id has no meaning on another host
        raise ValueError(f"the address {host} has a scope id")
    return SocketAddress(str(ipaddress.ip_address(host)), _decimal(port, maximum=0xFFFF))


def _decimal(text: str, maximum: int) -> int:
    if not text.isdigit() or len(text) > 10 or int(text) > maximum:
        raise ValueError(f"{text!r} is not a number from 0 to {maximum}")
    return int(text)
