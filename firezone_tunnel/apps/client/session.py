"""A user's connection to Firezone: commands go in by `Session`, news come out by its `EventStream`.

    session, events = Session.connect(url="wss://portal.example/", token=token)
    async for event in events: ...
    await session.close()

or `async with Session.connect(...) as (session, events): ...`, in a coroutine that Twisted runs. In an asyncio program
`firezone_tunnel.aio` has the same names.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred

from firezone_tunnel.apps.client.events import EventStream
from firezone_tunnel.apps.client.service import ClientService
from firezone_tunnel.errors import SessionClosed
from firezone_tunnel.shell.portal_link.service import trust_from_file
from firezone_tunnel.shell.portal_link.url import LoginUrl, default_name
from firezone_tunnel.shell.process.identity import load_identity
from firezone_tunnel.shell.runtime.endpoint import EndpointConfig
from firezone_tunnel.shell.tun.device import DEFAULT_NAME

DEFAULT_STATE_DIRECTORY = Path("/var/lib/dev.firezone.client/config")  # upstream's, so that a device keeps its identity
IDENTITY_FILE = "firezone-id.json"


class Session:
    """Commands to a running client. None of them blocks; once the session is closed all but `close` raise."""

    def __init__(self, service: ClientService) -> None:
        """For `connect` and its like only."""
        self._service = service

    @classmethod
    def connect(
        cls,
        *,
        url: str,
        token: str,
        device_id: str | None = None,
        name: str | None = None,
        state_directory: Path = DEFAULT_STATE_DIRECTORY,
        interface: str = DEFAULT_NAME,
        ca_file: Path | None = None,
        max_partition_time: float | None = None,
        reactor: Any = None,
    ) -> Connected:
        """Begin to connect; nothing has to succeed for this to return. What becomes of it is told by the events.

        :param url: of the portal.
        :param device_id: what the portal recognizes the device by; by default it is stored in `state_directory`.
        :param ca_file: PEM file with the only CAs to trust for the portal.
        :param max_partition_time: seconds without a portal after which the session ends; None: never.

        Raises: ConfigurationError.
        """
        config = EndpointConfig(
            url=LoginUrl.client(
                url,
                token,
                device_id=device_id or load_identity(state_directory / IDENTITY_FILE),
                name=name or default_name(),
            ),
            state_directory=state_directory,
            interface=interface,
            trust=None if ca_file is None else trust_from_file(ca_file),
            max_partition_time=max_partition_time,
        )
        if reactor is None:
            from twisted.internet import reactor
        events = EventStream()
        service = ClientService(reactor, config, events)
        service.startService()
        return Connected(cls(service), events)

    def reset(self, reason: str) -> None:
        """Begin anew with new keys and sockets; flows come back by themselves.

        Raises: SessionClosed.
        """
        if not self._service.running:
            raise SessionClosed("The session is closed: connect a new one")
        self._service.reset(reason)

    def close(self) -> Deferred[None]:
        """End the session; fires when the host is as it was before. May be called more than once."""
        return self._service.stopService()


class Connected(NamedTuple):
    """A session and its events; as an async context manager it closes the session on leaving."""

    session: Session
    events: EventStream

    async def __aenter__(self) -> Connected:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.session.close()
