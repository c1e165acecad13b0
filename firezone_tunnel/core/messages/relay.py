"""Messages between the portal and a relay (docs/protocol/portal-protocol.md, 2.5)."""

from __future__ import annotations

from firezone_tunnel.core.messages.common import PortalMessage

TOPIC = "relay"


class Join(PortalMessage, frozen=True, kw_only=True):
    """The payload of a relay's `phx_join`. The credentials for the relay are derived from its secret."""

    EVENTS = ("phx_join",)

    stamp_secret: str


class Init(PortalMessage, frozen=True, kw_only=True):
    EVENTS = ("init",)
