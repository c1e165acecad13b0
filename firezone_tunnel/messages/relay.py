"""Messages between the portal and a relay (spec/portal-protocol.md, 2.5)."""

from __future__ import annotations

from firezone_tunnel.messages.common import Message

TOPIC = "relay"


class Join(Message, frozen=True, kw_only=True):
    """The payload of a relay's `phx_join`: credentials for it are derived from this secret."""

    EVENTS = ("phx_join",)

    stamp_secret: str


class Init(Message, frozen=True, kw_only=True):
    EVENTS = ("init",)
