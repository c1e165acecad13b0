"""Whether a process lives and is ready, over HTTP: for container engines and load balancers.

See docs/protocol/gateway-and-relay.md, 5.1.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.web.resource import Resource
from twisted.web.server import Site

from firezone_tunnel import __version__
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import InUseError, PlatformError
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.reactor.service import Service


class HealthServer(Service):
    """`GET /healthz` is 200 while the process lives, `GET /readyz` 200 or 503; without an address nothing is served.

    The body of a 503 has the reasons.
    """

    def __init__(self, reactor: Any, address: SocketAddress | None, obstacles: Callable[[], list[str]]) -> None:
        """`obstacles()` gives the reasons why the process is not ready."""
        self._reactor = reactor
        self._address = address
        self._obstacles = obstacles
        self._port: IListeningPort | None = None

    def startService(self) -> None:
        """
        Raises: InUseError, PlatformError.
        """
        super().startService()
        if self._address is None:
            return
        root = Resource()
        root.putChild(b"healthz", _Answer(list))
        root.putChild(b"readyz", _Answer(self._obstacles))
        site = Site(root)
        site.noisy = False
        host, port = self._address
        try:
            self._port = self._reactor.listenTCP(port, site, interface=host)
        except CannotListenError as error:
            kind = InUseError if getattr(error.socketError, "errno", None) == errno.EADDRINUSE else PlatformError
            raise kind(
                f"Can't serve health checks on {self._address} ({error.socketError}): choose another "
                "--health-check-addr, or off"
            ) from error
        log.debug("health:listening", address=str(self._address))

    def stopService(self) -> Deferred[Any]:
        super().stopService()
        port, self._port = self._port, None
        return maybeDeferred(lambda: port.stopListening() if port is not None else None)


class _Answer(Resource):
    isLeaf = True

    def __init__(self, obstacles: Callable[[], list[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Twisted has no types here
        self._obstacles = obstacles

    def render_GET(self, request: Any) -> bytes:
        answer: dict[str, object] = {"status": "ok", "version": __version__}
        if obstacles := self._obstacles():
            request.setResponseCode(503)
            answer |= {"status": "not ready", "reasons": obstacles}
        request.setHeader(b"content-type", b"application/json")
        return json.dumps(answer).encode()
