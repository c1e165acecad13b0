"""After any sequence of events, packets flow both ways once the network has been healthy for 25 seconds."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.snownet.events import Role
from tests.hypothesis_profiles import examples
from tests.simulation.internet import Internet, exchange
from tests.simulation.nat import KINDS
from tests.unit.core.snownet.world import Host, assert_no_slot_is_lost, datagram, run_of_segments

_HEALTHY = 25.0
_MOMENTS = st.floats(0.0, 20.0, allow_nan=False)


class UnreliableInternet(RuleBasedStateMachine):
    """Two peers, two relays, and a portal that is always notified of a lost connection eventually.

    Punctual hosts also assert that no deadline lies in the past and that timers don't storm.
    """

    @initialize(client=st.sampled_from(KINDS), gateway=st.sampled_from(KINDS), seed=st.integers(0, 1 << 16))
    def begin(self, client: str, gateway: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.moves = 0
        self.internet = Internet()
        self.internet.relay(), self.internet.relay()
        self.client = self.internet.host_behind(client, Role.CLIENT)
        self.gateway = self.internet.host_behind(gateway, Role.GATEWAY)
        self.internet.introduce(self.client, self.gateway)

    @rule(loss=st.floats(0.0, 0.6), jitter=st.floats(0.0, 0.3))
    def network_turns_bad(self, loss: float, jitter: float) -> None:
        self.internet.lose = lambda sender, data: self.random.random() < loss
        self.internet.lose_from_relay = lambda data: self.random.random() < loss
        self.internet.delay = lambda sender: 0.01 + self.random.random() * jitter
        self.internet.delay_of_relay = lambda: 0.01 + self.random.random() * jitter

    @rule(is_open=st.booleans())
    def direct_path_opens_or_closes(self, is_open: bool) -> None:
        self.internet.direct = is_open

    @rule(index=st.integers(0, 1), is_announced=st.booleans())
    def relay_dies(self, index: int, is_announced: bool) -> None:
        self.internet.relays[index].alive = False
        if is_announced:
            self._announce_relays()

    @rule(index=st.integers(0, 1), is_announced=st.booleans(), forgets=st.booleans(), other_secret=st.booleans())
    def relay_returns(self, index: int, is_announced: bool, forgets: bool, other_secret: bool) -> None:
        relay = self.internet.relays[index]
        relay.alive = True
        if forgets or other_secret:
            relay.restart(f"secret {self.internet.now}" if other_secret else None)
        if is_announced:
            self._announce_relays()

    @rule()
    def client_roams(self) -> None:
        """The client gets other sockets and another key, and the portal sends it relays and its gateway again."""
        self.moves += 1
        self.client.node.reset(self.internet.now)
        self._move(self.client)
        self._announce_relays()
        self.internet.introduce(self.client, self.gateway)

    @rule()
    def gateway_roams(self) -> None:
        self.moves += 1
        self._move(self.gateway)
        self.gateway.node.restart_relays(self.internet.now)
        self.gateway.drain()

    @rule(is_up=st.booleans())
    def portal_goes_or_comes(self, is_up: bool) -> None:
        self.internet.portal_is_up = is_up
        if is_up:
            self._announce()

    @rule(generation=st.sampled_from(["", "another"]))
    def portal_introduces_again(self, generation: str) -> None:
        self.internet.introduce(self.client, self.gateway, generation=generation)

    @rule(side=st.booleans())
    def one_side_closes(self, side: bool) -> None:
        host, peer = (self.client, self.gateway) if side else (self.gateway, self.client)
        host.node.close_connection(peer.name, self.internet.now)
        host.drain()

    @rule(seconds=_MOMENTS)
    def time_passes(self, seconds: float) -> None:
        self.internet.run(seconds)

    @rule(minutes=st.sampled_from([1, 4, 11]))
    def long_time_passes(self, minutes: int) -> None:
        self.internet.run(minutes * 60.0)

    @rule(turns=st.integers(1, 20))
    def applications_talk(self, turns: int) -> None:
        for _ in range(turns):
            self.client.send(self.gateway, run_of_segments(segments=20), datagram("a"), datagram("b"))
            self.gateway.send(self.client, datagram("c"), run_of_segments(segments=5))
            self.internet.run(0.1)

    @precondition(lambda self: hasattr(self, "internet"))
    @rule()
    def network_heals(self) -> None:
        internet, client, gateway = self.internet, self.client, self.gateway
        internet.lose, internet.lose_from_relay = lambda sender, data: False, lambda data: False
        internet.delay, internet.delay_of_relay = lambda sender: 0.02, lambda: 0.02
        internet.direct = internet.portal_is_up = True
        for relay in internet.relays:
            relay.alive = True
        self._announce_relays()
        self._announce()

        end = internet.now + _HEALTHY
        while internet.now < end:
            if not (client.node.has_connection("gateway") and gateway.node.has_connection("client")):
                internet.introduce(client, gateway)  # a client asks for it when a packet has no path
            client.send(gateway, datagram("ping"))
            gateway.send(client, datagram("pong"))
            internet.run(0.5)

        exchange(internet, client, gateway, within=1.0)
        internet.run(1.0)
        assert_no_slot_is_lost([client, gateway])

    def teardown(self) -> None:
        if hasattr(self, "internet"):
            self.network_heals()

    def _move(self, host: Host) -> None:
        is_public = not self.internet.nats[host.name]
        prefix = "203.0.113" if is_public else f"10.{1 if host is self.client else 2}.77"
        last = 100 + self.moves % 100
        host.addresses = (SocketAddress(f"{prefix}.{last}", 52625),)
        host.node.set_local_addresses(host.addresses, self.internet.now)
        host.drain()

    def _announce_relays(self) -> None:
        """Announce the portal's connected and lost relays to both peers."""
        alive = [relay for relay in self.internet.relays if relay.alive]
        gone = [relay for relay in self.internet.relays if not relay.alive]
        for host in (self.client, self.gateway):
            self.internet.announce_relays(host, alive, gone=gone)

    def _announce(self) -> None:
        for host in (self.client, self.gateway):
            host.node.announce()
            host.drain()


TestUnreliableInternet = UnreliableInternet.TestCase
TestUnreliableInternet.settings = settings(
    max_examples=examples(30), stateful_step_count=12, suppress_health_check=list(HealthCheck)
)
