"""A relay with a simulated shell: sockets are sets of numbers, time is a float, and every sender is a client."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from firezone_tunnel.core.datagrams import DatagramBatch, receive_buffer
from firezone_tunnel.core.relay.allocator import RelayConfig
from firezone_tunnel.core.relay.credentials import CredentialSource, StampSecret, stamp_password
from firezone_tunnel.core.relay.outputs import ClosePort, Command, OpenPort
from firezone_tunnel.core.relay.peer_policy import Network, PeerPolicy
from firezone_tunnel.core.relay.server import RelayServer
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, long_term_key

UTC = 1_700_000_000.0
SECRET = "00112233445566778899aabbccddeeff" * 2
RELAY4 = "9.1.1.1"
RELAY6 = "2a01:1::1"
LISTEN4 = SocketAddress(RELAY4, 3478)
LISTEN6 = SocketAddress(RELAY6, 3478)
PEER4 = SocketAddress("8.8.4.4", 7000)
PEER6 = SocketAddress("2a02:2::2", 7000)
CLIENT4 = SocketAddress("5.5.5.5", 52625)
CLIENT6 = SocketAddress("2a03:3::3", 52625)


class Sent(NamedTuple):
    """A send: what arrives at `to`, from which socket (`port` 0: the listening socket) and address."""

    to: SocketAddress
    port: int
    source: SocketAddress | None
    datagrams: list[bytes]
    ecn: int
    dont_fragment: bool


class World:
    """`occupied` ports can't be opened; `sockets` is how many more sockets the host provides."""

    def __init__(
        self,
        *,
        credentials: CredentialSource | None = None,
        allow: Iterable[Network] = (),
        own_hosts: Iterable[str] = (),
        public_ipv4: str | None = RELAY4,
        public_ipv6: str | None = RELAY6,
        nonce_key: bytes | None = None,
        **config: Any,
    ) -> None:
        self.now = 1000.0
        self.entropy = random.Random(7).randbytes
        self.config = RelayConfig(public_ipv4=public_ipv4, public_ipv6=public_ipv6, **config)
        policy = PeerPolicy(
            relayed_hosts=self.config.hosts.values(),
            own_hosts=own_hosts,
            lowest_port=self.config.lowest_port,
            highest_port=self.config.highest_port,
            allow=tuple(allow),
        )
        self.server = RelayServer(
            self.config,
            credentials=credentials or StampSecret(SECRET),
            policy=policy,
            entropy=self.entropy,
            now=self.now,
            nonce_key=nonce_key,
        )
        self.buffer = receive_buffer()
        self.open: set[tuple[int, int]] = set()
        self.occupied: Callable[[int], bool] = lambda port: False
        self.sockets = 1_000_000
        self.commands: list[Command] = []

    @property
    def utc(self) -> float:
        return UTC + self.now

    def deliver(
        self,
        source: SocketAddress,
        data: bytes,
        *,
        segment_size: int = 0,
        local: SocketAddress | None = None,
        ecn: int = 0,
    ) -> list[Sent]:
        """Deliver to the listening port. Returns the sends of the relay."""
        batch = self._batch(source, data, segment_size, local or (LISTEN6 if source.is_ipv6 else LISTEN4), ecn)
        self.server.handle_client_datagrams(batch, self.now, self.utc)
        return self._settle()

    def deliver_to_port(
        self, port: int, source: SocketAddress, data: bytes, *, segment_size: int = 0, ecn: int = 0
    ) -> list[Sent]:
        """Deliver to an allocation's socket, which must be open."""
        assert (port, 2 if source.is_ipv6 else 1) in self.open
        local = SocketAddress(RELAY6 if source.is_ipv6 else RELAY4, port)
        self.server.handle_peer_datagrams(port, self._batch(source, data, segment_size, local, ecn), self.now)
        return self._settle()

    def advance(self, seconds: float) -> None:
        """Let time pass, calling every timer when it is due."""
        until = self.now + seconds
        while (timeout := self.server.next_timeout()) is not None and timeout.at <= until:
            assert timeout.at >= self.now, "a timer that is due and does nothing would spin"
            self.now = timeout.at
            self.server.handle_timeout(self.now)
            assert self._settle() == []
        self.now = until

    def drain(self) -> None:
        self.server.drain()
        self._settle()

    def _batch(
        self, source: SocketAddress, data: bytes, segment_size: int, local: SocketAddress, ecn: int
    ) -> DatagramBatch:
        self.buffer[: len(data)] = data
        return DatagramBatch.received(self.buffer, len(data), segment_size or len(data), source, local, ecn)

    def _settle(self) -> list[Sent]:
        self.buffer[:] = b"\xee" * len(self.buffer)  # the next batch overwrites it: nothing may point there
        for command in self.server.commands():
            self.commands.append(command)
            if isinstance(command, OpenPort):
                self._open(command)
            elif isinstance(command, ClosePort):
                self.open -= {(command.port, family) for family in command.families}
        sent = []
        for transmit in self.server.transmits():
            payload, size = bytes(transmit.payload), transmit.segment_size or max(1, len(transmit.payload))
            datagrams = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
            sent.append(
                Sent(
                    transmit.destination,
                    transmit.port,
                    transmit.source,
                    datagrams,
                    transmit.ecn,
                    transmit.dont_fragment,
                )
            )
            transmit.release()
        return sent

    def _open(self, command: OpenPort) -> None:
        exhausted = len(self.open) + len(command.families) > self.sockets
        if exhausted or self.occupied(command.port):
            self.server.handle_port_failed(command.port, self.now, exhausted=exhausted)
            return
        self.open |= {(command.port, family) for family in command.families}
        assert self.server.handle_port_opened(command.port, self.now)


class Client:
    """A correct TURN client, except for what a test adds or leaves out."""

    _salts = itertools.count()

    def __init__(
        self,
        world: World,
        address: SocketAddress = CLIENT4,
        *,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        self.world = world
        self.address = address
        salt = f"salt{next(self._salts)}"
        expiry = int(UTC) + 1_000_000
        self.username = username or f"{expiry}:{salt}"
        self.password = password or stamp_password(expiry, SECRET, salt)
        self.realm = "firezone"
        self.nonce: str | None = None

    @property
    def key(self) -> bytes:
        return long_term_key(self.username, self.realm, self.password)

    def encode(
        self,
        method: int,
        *attributes: tuple[stun.Attribute[Any], Any],
        transaction_id: bytes | None = None,
        fingerprint: bool = False,
    ) -> bytes:
        """An authenticated request."""
        credentials: list[tuple[stun.Attribute[Any], Any]] = [(stun.USERNAME, self.username), (stun.REALM, self.realm)]
        if self.nonce is not None:
            credentials.append((stun.NONCE, self.nonce))
        identity = transaction_id or self.world.entropy(12)
        message = Message(method, Kind.REQUEST, identity, (*attributes, *credentials))
        return message.encode(key=self.key, fingerprint=fingerprint)

    def request(self, method: int, *attributes: tuple[stun.Attribute[Any], Any], **options: Any) -> Message:
        """Send a request, authenticate if necessary, and check everything that holds for every answer."""
        if self.nonce is None:
            refusal = self.ask(self.encode(method, *attributes, **options))
            assert code_of(refusal) == 401
            self.nonce = refusal.get(stun.NONCE)
        answer = self.ask(self.encode(method, *attributes, **options))
        assert answer.is_authentic(self.key)
        return answer

    def ask(self, request: bytes) -> Message:
        """The only answer to a datagram. It must go to the sender, from the address that received the datagram."""
        (sent,) = self.world.deliver(self.address, request)
        assert (sent.to, sent.port) == (self.address, 0)
        assert sent.source == (LISTEN6 if self.address.is_ipv6 else LISTEN4)
        answer = parsed(sent.datagrams[0])
        assert answer.transaction_id == request[8:20]
        assert answer.method == parsed(request).method
        return answer

    def allocate(self, *attributes: tuple[stun.Attribute[Any], Any], **options: Any) -> Message:
        return self.request(Method.ALLOCATE, (stun.REQUESTED_TRANSPORT, stun.UDP), *attributes, **options)

    def allocate_dual(self) -> int:
        """Make a dual-stack allocation as Firezone's peers do. Returns its port."""
        answer = self.allocate((stun.ADDITIONAL_ADDRESS_FAMILY, stun.FAMILY_IPV6))
        return answer.get_all(stun.XOR_RELAYED_ADDRESS)[0].port

    def refresh(
        self, lifetime: int | None = None, *attributes: tuple[stun.Attribute[Any], Any], **options: Any
    ) -> Message:
        asked = () if lifetime is None else ((stun.LIFETIME, lifetime),)
        return self.request(Method.REFRESH, *asked, *attributes, **options)

    def permit(self, *peers: SocketAddress) -> Message:
        return self.request(Method.CREATE_PERMISSION, *((stun.XOR_PEER_ADDRESS, peer) for peer in peers))

    def bind(self, number: int, peer: SocketAddress) -> Message:
        return self.request(Method.CHANNEL_BIND, (stun.CHANNEL_NUMBER, number), (stun.XOR_PEER_ADDRESS, peer))

    def send_on(self, number: int, *payloads: bytes, padding: bytes = b"", ecn: int = 0) -> list[Sent]:
        """Send channel data. Several payloads form a batch; all but the last have the same size."""
        datagrams = [channel_data(number, payload) + padding for payload in payloads]
        size = len(datagrams[0])
        return self.world.deliver(self.address, b"".join(datagrams), segment_size=size, ecn=ecn)

    def indicate(self, peer: SocketAddress, data: bytes, *attributes: tuple[stun.Attribute[Any], Any]) -> list[Sent]:
        message = Message(
            Method.SEND,
            Kind.INDICATION,
            self.world.entropy(12),
            ((stun.XOR_PEER_ADDRESS, peer), (stun.DATA, data), *attributes),
        )
        return self.world.deliver(self.address, message.encode())


def channel_data(number: int, payload: bytes) -> bytes:
    return number.to_bytes(2, "big") + len(payload).to_bytes(2, "big") + payload


def code_of(message: Message) -> int:
    """The error code; 0 for a success."""
    error = message.get(stun.ERROR_CODE)
    assert (error is None) == (message.kind is Kind.SUCCESS)
    return 0 if error is None else error.code


def parsed(datagram: bytes) -> Message:
    message = stun.parse(datagram)
    assert message is not None
    return message


def relayed_port(answer: Message) -> int:
    assert code_of(answer) == 0
    return answer.get_all(stun.XOR_RELAYED_ADDRESS)[0].port
