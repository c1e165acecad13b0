"""An internet without sockets: hosts behind NATs, relays, and the portal that announces both.

Hosts and time come from `tests.unit.core.snownet.world`; relays run the real `RelayServer`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from itertools import count, pairwise

from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.packet.rewrite import CE
from firezone_tunnel.core.relay.allocator import RelayConfig
from firezone_tunnel.core.relay.credentials import CredentialSource, StampSecret, StaticUsers, stamp_password
from firezone_tunnel.core.relay.outputs import ClosePort, OpenPort
from firezone_tunnel.core.relay.peer_policy import PeerPolicy
from firezone_tunnel.core.relay.server import RelayServer
from firezone_tunnel.core.sansio import SocketAddress, Transmit
from firezone_tunnel.core.snownet.events import ConnectionEstablished, PathChanged, Role
from firezone_tunnel.core.snownet.relays import RelayTerms
from tests.simulation.nat import Nat, nats
from tests.unit.core.snownet.world import LATENCY, Host, World, datagram, stream

TURN_PORT = 3478
_DOCUMENTATION = tuple(ipaddress.ip_network(text) for text in ("198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32"))
_STANDARD_REALM, _STANDARD_USER, _STANDARD_PASSWORD = "example.org", "alice", "correct horse"


class Relay:
    """A relay at 198.51.100.`number` and 2001:db8:51::`number`. While it isn't `alive`, it is silent."""

    def __init__(self, internet: Internet, number: int, *, families: str = "46", standard: bool = False) -> None:
        self.internet = internet
        self.rid = f"relay {number}"
        self.ipv4 = SocketAddress(f"198.51.100.{number}", TURN_PORT) if "4" in families else None
        self.ipv6 = SocketAddress(f"2001:db8:51::{number}", TURN_PORT) if "6" in families else None
        self.alive = True
        self.batches: list[tuple[int, bytes, int]] = []
        """The batches received at its listening port: segment size, payload and ECN of each."""
        self._number = number
        self._standard = standard
        self._buffer = receive_buffer()
        self._woken_at = float("inf")
        self._secret = f"{number:064}"
        self.restart()

    @property
    def listening(self) -> tuple[SocketAddress, ...]:
        return tuple(address for address in (self.ipv4, self.ipv6) if address is not None)

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(address.host for address in self.listening)

    def restart(self, secret: str | None = None) -> None:
        """Restart without any allocations. With another secret, all former credentials are invalid."""
        self._secret = secret or self._secret
        ipv4, ipv6 = (address.host if address else None for address in (self.ipv4, self.ipv6))
        config = RelayConfig(public_ipv4=ipv4, public_ipv6=ipv6)
        policy = PeerPolicy(
            relayed_hosts=self.hosts,
            lowest_port=config.lowest_port,
            highest_port=config.highest_port,
            allow=_DOCUMENTATION,
        )
        credentials: CredentialSource = StampSecret(self._secret)
        if self._standard:
            credentials = StaticUsers({_STANDARD_USER: _STANDARD_PASSWORD}, _STANDARD_REALM)
        world = self.internet
        entropy = stream(f"{self.rid} {world.now}")
        self.server = RelayServer(config, credentials=credentials, policy=policy, entropy=entropy, now=world.now)
        self._open: dict[int, None] = {}

    def terms(self, host: Host) -> RelayTerms:
        """The terms for this relay that the portal sends to a host."""
        if self._standard:
            return RelayTerms(self.rid, self.ipv4, self.ipv6, _STANDARD_USER, _STANDARD_PASSWORD, realm=None)
        expiry = int(self.internet.utc) // 86400 * 86400 + 14 * 86400
        password = stamp_password(expiry, self._secret, host.name)
        return RelayTerms(self.rid, self.ipv4, self.ipv6, f"{expiry}:{host.name}", password)

    def listens_at(self, address: SocketAddress) -> bool:
        return address in self.listening or (address.host in self.hosts and address.port in self._open)

    def take_in(self, datagrams: list[bytes], source: SocketAddress, local: SocketAddress, ecn: int) -> None:
        if not self.alive:
            return
        data = b"".join(datagrams)
        self._buffer[: len(data)] = data
        batch = DatagramBatch.received(self._buffer, len(data), len(datagrams[0]), source, local, ecn)
        if local in self.listening:
            self.batches.append((len(datagrams[0]), data, ecn))
            self.server.handle_client_datagrams(batch, self.internet.now, self.internet.utc)
        elif local.port in self._open:
            self.server.handle_peer_datagrams(local.port, batch, self.internet.now)
        self._drain()

    def _drain(self) -> None:
        for command in self.server.commands():
            if isinstance(command, OpenPort):
                self._open[command.port] = None
                self.server.handle_port_opened(command.port, self.internet.now)
            elif isinstance(command, ClosePort):
                self._open.pop(command.port, None)
        for transmit in self.server.transmits():
            host = self.hosts[-1] if transmit.destination.is_ipv6 else self.hosts[0]
            self.internet.forward(transmit, SocketAddress(host, transmit.port or TURN_PORT))
            transmit.release()
        due = self.server.next_timeout()
        if due is not None and not self.internet.now < self._woken_at <= due.at:
            self._woken_at = due.at
            self.internet._later(max(0.0, due.at - self.internet.now), self._wake)

    def _wake(self) -> None:
        if self.internet.now >= self._woken_at:
            self._woken_at = float("inf")
            self.server.handle_timeout(self.internet.now)
            self._drain()


class Internet(World):
    """A world with NATs and relays. If `direct` is false, hosts reach each other only through relays.

    `congested` sets the congestion mark on all ECN-capable datagrams.

    `lose_from_relay(datagram)` and `delay_of_relay()` are the network on a relay's way out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.direct = True
        self.congested = False
        self.relays: list[Relay] = []
        self.nats: dict[str, list[Nat]] = {}
        self.arrived: list[tuple[float, Host, SocketAddress, list[bytes], int]] = []
        """The batches delivered to each host, with their source and ECN."""
        self.lose_from_relay: Callable[[bytes], bool] = lambda datagram: False
        self.delay_of_relay: Callable[[], float] = lambda: LATENCY
        self._public = count(11)

    def relay(self, *, families: str = "46", standard: bool = False) -> Relay:
        relay = Relay(self, len(self.relays) + 1, families=families, standard=standard)
        self.relays.append(relay)
        return relay

    def host_behind(self, nat: str, role: Role, *, name: str | None = None, relays: list[Relay] | None = None) -> Host:
        """A host with IPv4, behind a NAT of this name. The portal announces all relays to it, or only the given relays.

        See docs/decisions.md, 8.
        """
        number = next(self._public)
        public = f"203.0.113.{number}"
        address = public if nat == "none" else f"10.0.{number}.1"
        return self.host_at(address, nat=nat, public=public, role=role, name=name, relays=relays)

    def host_at(
        self,
        *addresses: str,
        nat: str,
        role: Role,
        public: str = "203.0.113.1",
        name: str | None = None,
        relays: list[Relay] | None = None,
    ) -> Host:
        """A host with these addresses, signalled in order of preference."""
        name = name or role.value
        host = self._host(name, role, *addresses)
        self.nats[name] = nats(nat, public, stream(f"nat {name}"))
        self.announce_relays(host, self.relays if relays is None else relays)
        return host

    def announce_relays(self, host: Host, connected: list[Relay], gone: list[Relay] | None = None) -> None:
        """Announce relays as `init` and `relays_presence` do."""
        host.node.update_relays(
            [relay.rid for relay in gone or []], [relay.terms(host) for relay in connected], self.now
        )
        host.drain()

    def rebind(self, host: Host, *addresses: SocketAddress) -> None:
        """Replace the host's sockets as a gateway does after roaming."""
        host.addresses = addresses
        host.node.set_local_addresses(addresses, self.now)
        host.node.restart_relays(self.now)
        host.drain()

    def offer(self, host: Host, *addresses: SocketAddress, deprecated: tuple[SocketAddress, ...] = ()) -> None:
        """Give a host these addresses, with the same sockets; from the deprecated ones it only sends where asked to."""
        host.addresses = (*addresses, *deprecated)
        host.node.set_local_addresses(addresses, self.now)
        host.drain()

    def carry(self, sender: Host, transmit: Transmit) -> None:
        payload = bytes(transmit.payload)
        datagrams = _cut(payload, transmit.segment_size)
        sender.sent += [(self.now, datagram) for datagram in datagrams]
        arriving = [datagram for datagram in datagrams if not self.lose(sender, datagram)]
        source: SocketAddress | None = _source(sender, transmit)
        for nat in self.nats.get(sender.name, ()):
            if source is not None:
                source = nat.outbound(source, transmit.destination, self.now)
        if arriving and source is not None:
            self._send(arriving, source, transmit.destination, transmit.ecn, self.delay(sender))

    def forward(self, transmit: Transmit, source: SocketAddress) -> None:
        """A relay sends."""
        datagrams = _cut(bytes(transmit.payload), transmit.segment_size)
        arriving = [datagram for datagram in datagrams if not self.lose_from_relay(datagram)]
        if arriving:
            self._send(arriving, source, transmit.destination, transmit.ecn, self.delay_of_relay())

    def inject(self, host: Host, datagrams: list[bytes], source: SocketAddress, *, ecn: int = 0) -> None:
        """Deliver datagrams to a host from this source, without delay."""
        host.handle(
            datagrams, source, next(address for address in host.addresses if address.is_ipv6 == source.is_ipv6), ecn
        )

    def _send(
        self, datagrams: list[bytes], source: SocketAddress, destination: SocketAddress, ecn: int, delay: float
    ) -> None:
        self._later(delay, lambda: self._arrive(datagrams, source, destination, ecn))

    def _arrive(self, datagrams: list[bytes], source: SocketAddress, destination: SocketAddress, ecn: int) -> None:
        if ecn and self.congested:
            ecn = CE
        for relay in self.relays:
            if relay.listens_at(destination):
                relay.take_in(datagrams, source, destination, ecn)
                return
        if not self.direct and not any(source.host in relay.hosts for relay in self.relays):
            return
        for host in list(self.hosts.values()):
            inner = self._inside(host, destination, source)
            if inner in host.addresses:
                self.arrived.append((self.now, host, source, datagrams, ecn))
                host.handle(datagrams, source, inner, ecn)

    def _inside(self, host: Host, destination: SocketAddress, source: SocketAddress) -> SocketAddress:
        inner: SocketAddress | None = destination
        for nat in reversed(self.nats.get(host.name, ())):
            if inner is not None:
                inner = nat.inbound(inner, source, self.now)
        return inner or SocketAddress("0.0.0.0", 0)

    def _host(self, name: str, role: Role, *addresses: str) -> Host:
        host = self.hosts[name] = Punctual(self, name, role, *addresses)
        return host


class Punctual(Host):
    """A host that checks its node: no deadlines in the past, no busy loops, nothing left undrained."""

    def __init__(self, world: World, name: str, role: Role, *addresses: str) -> None:
        super().__init__(world, name, role, *addresses)
        self.answers = False
        """Whether to answer every packet."""
        self.heard: list[float] = []
        """The times at which packets arrived."""
        self.wake_ups = 0
        self._is_paused = False
        self._woken_at: list[float] = []

    def take_in(
        self, data: bytes, segment_size: int, source: SocketAddress, local: SocketAddress, ecn: int = 0
    ) -> None:
        if self._is_paused:
            return
        before = len(self.packets)
        super().take_in(data, segment_size, source, local, ecn)
        for name, _ in self.packets[before:]:
            self.heard.append(self.world.now)
            if self.answers:
                self.send(self.world.hosts[name], datagram("pong"))

    def drain(self) -> None:
        """The guards that let a host skip its reads must not hide anything."""
        reported, has_events = len(self.events), self.node.has_events
        super().drain()
        assert has_events or len(self.events) == reported
        assert [*self.node._relays.events(), *self.node._relays.transmits()] == []

    def pause(self) -> None:
        """Suspend the host: it does nothing, and what arrives is lost."""
        self._is_paused = True

    def resume(self) -> None:
        """The host goes on, and probes as the shell lets it. Its deadlines may be long past."""
        self._is_paused = False
        self.node.probe(self.world.now, self.world.utc)
        self.drain()
        self.handle_timeout()

    def due_at(self) -> float:
        if self._is_paused:
            return float("inf")
        due = super().due_at()
        assert due >= self.world.now, f"{self.name}: {self.node.next_timeout()} is {self.world.now - due} s ago"
        return due

    def handle_timeout(self) -> None:
        self.wake_ups += 1
        self._woken_at = [at for at in self._woken_at if at > self.world.now - 1.0] + [self.world.now]
        assert len(self._woken_at) < 400, f"{self.name}: {self.node.next_timeout()}"
        super().handle_timeout()


def way(host: Host, peer: Host) -> str:
    """The path of the connection to a peer, as last reported: "direct" or "relayed"."""
    paths: list[str] = [it.path for it in host.of(ConnectionEstablished | PathChanged) if it.peer_id == peer.name]
    return paths[-1]


def exchange(internet: Internet, client: Host, gateway: Host, *, within: float) -> float:
    """Send both ways 20 times a second, until packets arrive both ways. Returns the time that it took."""
    start = internet.now
    client.packets.clear()
    gateway.packets.clear()
    while not (client.texts(gateway) and gateway.texts(client)):
        assert internet.now - start < within, f"no packets both ways within {within} s"
        client.send(gateway, datagram("ping"))
        gateway.send(client, datagram("pong"))
        internet.run(0.05)
    return internet.now - start


def ping(internet: Internet, client: Host, gateway: Host, *, seconds: float) -> list[float]:
    """20 requests a second, each answered. Returns when answers came."""
    assert isinstance(client, Punctual) and isinstance(gateway, Punctual)
    client.heard.clear()
    gateway.answers = True
    end = internet.now + seconds
    while internet.now < end:
        client.send(gateway, datagram("ping"))
        internet.run(0.05)
    gateway.answers = False
    return list(client.heard)


def longest_gap(times: list[float], start: float, end: float) -> float:
    points = [start, *times, end]
    return max(after - before for before, after in pairwise(points))


def _cut(payload: bytes, segment_size: int) -> list[bytes]:
    size = segment_size or len(payload)
    return [payload[start : start + size] for start in range(0, len(payload), size)]


def _source(sender: Host, transmit: Transmit) -> SocketAddress | None:
    """The socket that a datagram leaves from; None if the host doesn't have this address (any longer)."""
    wanted = transmit.source
    mine: Iterator[SocketAddress] = (
        address for address in sender.addresses if address.is_ipv6 == transmit.destination.is_ipv6
    )
    return next((address for address in mine if wanted is None or address.host == wanted.host), None)
