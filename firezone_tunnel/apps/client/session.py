"""A user's connection to Firezone: a `Session` takes commands, its `EventStream` delivers events.

    session, events = Session.connect(url="wss://portal.example/", token=token)
    async for event in events: ...
    await session.close()

or `async with Session.connect(...) as (session, events): ...`, in a coroutine that Twisted runs. For asyncio programs
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

# As upstream's client has it, so that a device that switches keeps its identity.
DEFAULT_STATE_DIRECTORY = Path("/var/lib/dev.firezone.client/config")
IDENTITY_FILE = "firezone-id.json"


class Session:
    """Commands to a running client. None of them blocks. After the session has ended, all but `close` raise."""

    def __init__(self, service: ClientService) -> None:
        """Internal: use `connect`."""
        self._service = service

    @classmethod
    def connect(
        cls,
        *,
        url: str,
        token: str,
        device_id: str | None = None,
        name: str | None = None,
        state_directory: str | Path = DEFAULT_STATE_DIRECTORY,
        interface: str = DEFAULT_NAME,
        ca_file: str | Path | None = None,
        max_partition_time: float | None = None,
        reactor: Any = None,
    ) -> Connected:
        """Start to connect, and return at once. The events report progress and failures.

        :param url: the portal's URL.
        :param token: a client token.
        :param device_id: the portal recognizes the device by it. Default: a random one stored in `state_directory`.
        :param name: the device's name in the portal. Default: the host's name.
        :param state_directory: for files that must survive a restart.
        :param interface: name of the TUN device.
        :param ca_file: PEM file with the only CAs to trust for the portal. Default: the host's.
        :param max_partition_time: seconds without a portal after which the session ends. Default: never.
        :param reactor: default: the global one.

        Raises: ConfigurationError.
        """
        state_directory = Path(state_directory)
        config = EndpointConfig(
            url=LoginUrl.client(
                url,
                token,
                device_id=device_id or load_identity(state_directory / IDENTITY_FILE),
                name=name or default_name(),
            ),
            state_directory=state_directory,
            interface=interface,
            trust=None if ca_file is None else trust_from_file(Path(ca_file)),
            max_partition_time=max_partition_time,
        )
        if reactor is None:
            from twisted.internet import reactor
        service = ClientService(reactor, config)
        service.startService()
        return Connected(cls(service), EventStream(service.events))

    def reset(self, reason: str) -> None:
        """Start again with new keys and sockets. Flows recover by themselves. `reason` is logged.

        Raises: SessionClosed.
        """
        if not self._service.running:
            raise SessionClosed("The session is closed: connect a new one")
        self._service.reset(reason)

    def close(self) -> Deferred[None]:
        """End the session. Fires when the host's network is restored. May be called more than once."""
        return self._service.stopService()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._service.summary()}>"


class Connected(NamedTuple):
    """A session and its events. As an async context manager it closes the session on exit."""

    session: Session
    events: EventStream

    async def __aenter__(self) -> Connected:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.session.close()
