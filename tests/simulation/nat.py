"""Models of NATs: the port that a datagram leaves from, and which datagrams are let in (docs/decisions.md, 8)."""

from __future__ import annotations

from typing import NamedTuple

from firezone_tunnel.core.sansio import Entropy, SocketAddress

MAPPING_LIFETIME = 30.0  # what Linux grants to UDP that wasn't answered yet: the shortest in wide use
TURN_PORT = 3478
KINDS = ("none", "cone", "fullcone", "symmetric", "double", "cgn", "udp-blocked")


class Nat:
    """A box with one public IPv4 address. IPv6 passes unchanged.

    Endpoint-independent mapping that keeps the port, filtered by address and port. `is_symmetric`: a random port for
    each destination; `is_open`: no filter, and the mapping never ends; `only_turn`: UDP leaves for port 3478 only.
    """

    def __init__(
        self,
        public: str,
        entropy: Entropy,
        *,
        is_symmetric: bool = False,
        is_open: bool = False,
        only_turn: bool = False,
    ) -> None:
        self.public = public
        self.is_symmetric = is_symmetric
        self.is_open = is_open
        self.only_turn = only_turn
        self._entropy = entropy
        self._ports: dict[tuple[SocketAddress, SocketAddress | None], _Mapping] = {}
        self._used: dict[tuple[SocketAddress, SocketAddress], float] = {}
        """(inner, outer address) -> when a datagram last passed, either way."""

    def outbound(self, source: SocketAddress, destination: SocketAddress, now: float) -> SocketAddress | None:
        """The source that the destination sees; None if the datagram doesn't leave."""
        if self.only_turn and destination.port != TURN_PORT:
            return None
        if source.is_ipv6:
            return source
        key = (source, destination if self.is_symmetric else None)
        mapping = self._ports.get(key)
        if mapping is None or now - mapping.used_at > MAPPING_LIFETIME:
            mapping = _Mapping(self._free_port(source.port, now), now)
            for other in [destination for destination, old in self._ports.items() if old.port == mapping.port]:
                del self._ports[other]  # it has expired, and the port belongs to another mapping now
        self._ports[key] = mapping._replace(used_at=now)
        self._used[source, destination] = now
        return SocketAddress(self.public, mapping.port)

    def inbound(self, destination: SocketAddress, source: SocketAddress, now: float) -> SocketAddress | None:
        """The inner destination of a datagram from outside; None if it doesn't come in."""
        if destination.is_ipv6:
            return None if self.only_turn and source.port != TURN_PORT else destination
        if destination.host != self.public:
            return None
        for (inner, towards), mapping in self._ports.items():
            if mapping.port != destination.port or (towards is not None and towards != source):
                continue
            if self.is_open:
                return inner
            if now - self._used.get((inner, source), float("-inf")) <= MAPPING_LIFETIME:
                self._used[inner, source] = now
                self._ports[inner, towards] = mapping._replace(used_at=now)
                return inner
        return None

    def _free_port(self, wanted: int, now: float) -> int:
        taken = [mapping.port for mapping in self._ports.values() if now - mapping.used_at <= MAPPING_LIFETIME]
        port = wanted
        while self.is_symmetric or port in taken:
            port = 1024 + int.from_bytes(self._entropy(2), "big") % 64000
            if port not in taken:
                break
        return port


class _Mapping(NamedTuple):
    port: int
    used_at: float


def nats(kind: str, public: str, entropy: Entropy) -> list[Nat]:
    """The boxes in front of a host, innermost first."""
    match kind:
        case "none":
            return []
        case "cone":
            return [Nat(public, entropy)]
        case "fullcone":
            return [Nat(public, entropy, is_open=True)]
        case "symmetric":
            return [Nat(public, entropy, is_symmetric=True)]
        case "udp-blocked":
            return [Nat(public, entropy, only_turn=True)]
        case "double" | "cgn":
            inner = "100.64.0." + public.rpartition(".")[2]
            return [Nat(inner, entropy), Nat(public, entropy)]
    raise ValueError(kind)


def expected_way(client: str, gateway: str) -> str:
    """How a pair of NATs connects (docs/decisions.md, 8)."""
    pair = {"cone" if kind in {"double", "cgn"} else kind for kind in (client, gateway)}
    if "udp-blocked" in pair:
        return "relayed"
    if pair & {"none", "fullcone"} or pair == {"cone"}:
        return "direct"
    return "relayed"
