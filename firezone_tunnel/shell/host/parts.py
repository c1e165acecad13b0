"""The wanted state of a host's network, and the parts that observe it and put it right."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from typing import ClassVar

import attrs

from firezone_tunnel.core.messages.common import Network


class Aspect(enum.Flag):
    """A side of the host's network, of which the kernel reports changes."""

    LINK = enum.auto()
    """Our interface and its addresses."""
    RULES = enum.auto()
    ROUTES = enum.auto()
    """In our own tables."""
    UPLINKS = enum.auto()
    """Other interfaces, their addresses and default routes."""
    SETTINGS = enum.auto()
    """Forwarding and reverse-path filtering."""
    NFTABLES = enum.auto()


EVERYTHING = ~Aspect(0)


@attrs.frozen
class HostState:
    """The host's network as a client or gateway wants it. Without addresses only the firewall is set up."""

    ipv4: str | None = None
    ipv6: str | None = None
    routes: tuple[Network, ...] = ()
    """The networks that the host routes into the tunnel."""
    uplinks: tuple[str, ...] = ()
    """The interfaces that lead to the internet."""
    is_guarded: bool = False
    """Whether packets to `routes` that would leave outside of the tunnel are dropped."""


@attrs.frozen
class Change:
    """A thing that a part has put right or, with a `failure`, could not. `item` names it: "the IPv4 rule"."""

    item: str
    failure: str | None = None


class Part(ABC):
    """A part of the host's network that is observed and put right. All calls block, in one thread."""

    watches: ClassVar[Aspect]
    """Where changes of the kernel concern this part."""

    @abstractmethod
    def needs(self, state: HostState) -> object:
        """The values of the wanted state that this part depends on. It has to run again when they change."""

    @abstractmethod
    def put_right(self, state: HostState, *, is_suspect: bool) -> list[Change]:
        """Observe the kernel and change what differs from the wanted state. Returns the changes.

        `is_suspect`: other programs may have changed something. Otherwise only the wanted state has changed.

        Raises: PlatformError, if this part can't do anything.
        """

    @abstractmethod
    def remove(self) -> None:
        """Leave the host as it was before. May be called more than once.

        Raises: PlatformError.
        """
