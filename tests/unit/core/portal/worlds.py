"""Small configurations and sessions for the tests of the portal's decisions."""

from __future__ import annotations

import base64
from typing import Any

from firezone_tunnel.core.messages.common import Generation
from firezone_tunnel.core.portal.account import (
    Account,
    Actor,
    DnsSettings,
    PeerRole,
    Policy,
    Resource,
    Site,
    Token,
    token_hash,
)
from firezone_tunnel.core.portal.conditions import Condition
from firezone_tunnel.core.portal.devices import Device, DeviceSession, Identity
from firezone_tunnel.core.portal.versions import parse_user_agent


class Heard:
    """A socket that records what is pushed."""

    def __init__(self) -> None:
        self.pushed: list[tuple[str, Any]] = []
        self.is_closed = False

    def push(self, event: str, payload: Any) -> None:
        self.pushed.append((event, payload))

    def close(self) -> None:
        self.is_closed = True

    def probe(self) -> None:
        """The peer's host is there."""

    def disconnect(self, reason: str) -> None:
        self.push("disconnect", {"reason": reason})
        self.close()


def account(*policies: tuple[Condition, ...], expires_at: int | None = None, address: str = "10.0.0.0/8") -> Account:
    """A seed with a site, an actor, a resource, and for each argument a policy with these conditions."""
    token = Token("token", PeerRole.CLIENT, token_hash("client"), "actor", expires_at)
    return Account(
        id="account",
        name="Acme",
        slug="acme",
        dns=DnsSettings(),
        sites={"site": Site("site", "HQ")},
        groups={"group": "Everyone"},
        actors={"actor": Actor("actor", "Dev", None, ("group",))},
        tokens={token.hash: token},
        resources={"lab": Resource("lab", "Lab", "cidr", address, None, None, ("site",), ())},
        policies=tuple(
            Policy(f"policy-{number}", "group", "lab", conditions) for number, conditions in enumerate(policies)
        ),
    )


def session(
    role: PeerRole,
    id_: str,
    *,
    generation: Generation = Generation.V1,
    agent: str = "connlib/1.5.3",
    token: Token | None = None,
) -> DeviceSession:
    """A joined session; a client may see the lab."""
    parsed = parse_user_agent(agent)
    assert parsed is not None
    owner = "actor" if role is PeerRole.CLIENT else "site"
    made = DeviceSession(
        device=Device(
            id=id_,
            identity=Identity(role, owner, id_),
            name=id_,
            public_key=base64.b64encode(id_.encode().ljust(32)).decode(),
            psk_base=bytes(32),
            ipv4="100.64.0.7",
            ipv6="fd00:2021:1111::7",
            remote_ip="192.0.2.7",
            user_agent=agent,
        ),
        generation=generation,
        agent=parsed,
        token=token or Token("token", role, token_hash(role.value), owner, None),
        socket=Heard(),
        is_joined=True,
    )
    if role is PeerRole.CLIENT:
        made.resources = {"lab": {}}
    return made


def heard(session_: DeviceSession) -> list[tuple[str, Any]]:
    assert isinstance(session_.socket, Heard)
    return session_.socket.pushed
