"""Types that several messages share, and reading and writing messages (docs/protocol/portal-protocol.md, 2.0)."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import ProtocolError

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""32 bytes, on the wire standard padded base64."""

Port = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]

UnixTime = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""In seconds. JSON has larger numbers, with which the arithmetic of clocks would overflow."""

MAX_CANDIDATES = 100
"""In one message: a peer keeps no more (docs/protocol/data-plane.md, 2.4.6). The rest is ignored."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Generation(enum.Enum):
    """The names that the messages of a connection have; its path selects them.

    V1: upstream of August 2025, `/client/websocket`. V2: upstream of August 2026, `/client/v2/websocket`.
    """

    V1 = 1
    V2 = 2


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON object; unknown keys are ignored."""


class PortalMessage(Record, frozen=True, kw_only=True):
    """A payload and the names of its event, that of V1 first, that of V2 last."""

    EVENTS: ClassVar[tuple[str, ...]]

    @classmethod
    def event(cls, generation: Generation) -> str:
        return cls.EVENTS[0] if generation is Generation.V1 else cls.EVENTS[-1]


class DnsServer(Record, frozen=True, kw_only=True):
    protocol: Literal["ip_port"] = "ip_port"
    address: str


class Do53Server(Record, frozen=True, kw_only=True):
    ip: str


class DohServer(Record, frozen=True, kw_only=True):
    url: str


class Interface(Record, frozen=True, kw_only=True):
    """The tunnel addresses and, for clients, DNS settings."""

    ipv4: ipaddress.IPv4Address
    ipv6: ipaddress.IPv6Address
    upstream_dns: list[DnsServer] = []
    search_domain: str | None = None
    upstream_do53: list[Do53Server] = []
    upstream_doh: list[DohServer] = []


class IceCredentials(Record, frozen=True, kw_only=True):
    username: str
    password: str


class Relay(Record, frozen=True, kw_only=True):
    """One address of a relay; a dual-stack relay is two adjacent entries with one id.

    `realm` is an extension of ours, sent to our own peers only: it marks a standard TURN server, which upstream's
    peers don't support. None stands for the realm that the server names.
    """

    id: str
    type: Literal["turn"] = "turn"
    addr: str
    username: str
    password: str
    expires_at: UnixTime
    realm: str | msgspec.UnsetType | None = msgspec.UNSET

    def __post_init__(self) -> None:
        """Raises: ValueError for an invalid address, so that a list leaves out the entry."""
        SocketAddress.parse(self.addr)

    @property
    def address(self) -> SocketAddress:
        return SocketAddress.parse(self.addr)


class Filter(Record, frozen=True, kw_only=True, omit_defaults=False):
    """Traffic that passes: an inclusive port range of TCP or UDP, or ICMP."""

    protocol: Literal["tcp", "udp", "icmp"]
    port_range_start: Port = 0
    port_range_end: Port = 0xFFFF

    def __str__(self) -> str:
        first, last = self.port_range_start, self.port_range_end
        if self.protocol == "icmp" or (first, last) == (0, 0xFFFF):
            return self.protocol
        return f"{self.protocol}/{first}" if first == last else f"{self.protocol}/{first}-{last}"


def describe_filters(filters: Sequence[Filter]) -> str:
    """The traffic that a resource's filters allow, such as "tcp/80, icmp"; without filters all of it passes."""
    return ", ".join(map(str, filters)) or "everything"


class Site(Record, frozen=True, kw_only=True):
    """The wire calls it a gateway group."""

    id: str
    name: str


class FlowLogs(Record, frozen=True, kw_only=True):
    """V2 peers require it in `init`; an interval of 0 disables the upload."""

    api_url: str = ""
    upload_interval_secs: int = 0
    upload_batch_size: int = 0


class Authorization(Record, frozen=True, kw_only=True):
    client_id: str
    resource_id: str
    expires_at: UnixTime | None = None


class RelaysPresence(PortalMessage, frozen=True, kw_only=True):
    """Drop the listed relays, then upsert the connected ones; relays in neither list stay."""

    EVENTS = ("relays_presence",)

    disconnected_ids: list[str]
    connected: list[Relay]


class NoRelays(PortalMessage, frozen=True, kw_only=True):
    """We have to connect without knowing a relay; the portal answers with `RelaysPresence`."""

    EVENTS = ("no_relays",)


class SnownetCapabilities(PortalMessage, frozen=True, kw_only=True):
    """V2 peers announce their capabilities after each join; we never announce iceless."""

    EVENTS = ("set_snownet_capabilities",)

    iceless: bool = False


M = TypeVar("M", bound=Record)


def read(kind: type[M], payload: object) -> M:
    """Validate a decoded JSON payload as `kind`.

    Raises: ProtocolError, naming the field that is wrong.
    """
    try:
        return msgspec.convert(payload, kind, dec_hook=_read_special, strict=True)
    except (msgspec.ValidationError, ValueError) as error:
        raise ProtocolError(f"{kind.__name__}: {error}") from error


def readable(kind: Any, entries: object, skipped: list[str] | None) -> object:
    """The entries of a list that can be read as `kind`, or `entries` itself if it isn't a list.

    An unreadable entry is never fatal (docs/protocol/portal-protocol.md, 2.0): it is left out, and the reason is added
    to `skipped`.
    """
    if not isinstance(entries, list):
        return entries
    found = []
    for entry in entries:
        try:
            msgspec.convert(entry, kind, dec_hook=_read_special, strict=True)
        except (msgspec.ValidationError, ValueError) as error:
            if skipped is not None:
                skipped.append(str(error))
        else:
            found.append(entry)
    return found


def write(message: Record) -> dict[str, Any]:
    """The payload as plain JSON values."""
    payload: dict[str, Any] = msgspec.to_builtins(message, enc_hook=str)
    return payload


def rename(payload: object, aliases: Mapping[str, str]) -> object:
    """Rename keys from their V2 to their V1 spelling, unless the V1 key is present."""
    if not isinstance(payload, dict):
        return payload
    return {aliases.get(key, key) if aliases.get(key) not in payload else key: value for key, value in payload.items()}


def _read_special(kind: Any, value: object) -> Any:
    if kind in (ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network):
        if not isinstance(value, str):
            raise ValueError(f"expected text, got {value!r}")
        return kind(value)
    if kind in (Network, IPAddress):
        return ipaddress.ip_network(str(value)) if kind is Network else ipaddress.ip_address(str(value))
    raise NotImplementedError(kind)
