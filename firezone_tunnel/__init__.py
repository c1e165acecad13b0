"""A Firezone-compatible zero-trust tunnel: client, gateway, relay and portal.

The public names resolve lazily (PEP 562): importing this package loads neither a reactor nor an application.
`firezone_tunnel.aio` has the session's names for asyncio programs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from firezone_tunnel.apps.client.events import (
        AllGatewaysOffline,
        Disconnected,
        Event,
        EventStream,
        GatewayVersionMismatch,
        ResourcesUpdated,
        TunInterfaceUpdated,
    )
    from firezone_tunnel.apps.client.session import Connected, Session
    from firezone_tunnel.apps.gateway.service import GatewayService
    from firezone_tunnel.apps.portal.service import PortalService
    from firezone_tunnel.apps.relay.service import RelayService
    from firezone_tunnel.core.tunnel.resources import ResourceView
    from firezone_tunnel.errors import (
        AuthenticationError,
        ConfigurationError,
        FirezoneError,
        PlatformError,
        PortalError,
        SessionClosed,
    )

__version__ = "0.1.0"

__all__ = [
    "AllGatewaysOffline",
    "AuthenticationError",
    "ConfigurationError",
    "Connected",
    "Disconnected",
    "Event",
    "EventStream",
    "FirezoneError",
    "GatewayService",
    "GatewayVersionMismatch",
    "PlatformError",
    "PortalError",
    "PortalService",
    "RelayService",
    "ResourceView",
    "ResourcesUpdated",
    "Session",
    "SessionClosed",
    "TunInterfaceUpdated",
    "__version__",
]

_MODULES = {
    "firezone_tunnel.apps.client.events": (
        "AllGatewaysOffline",
        "Disconnected",
        "Event",
        "EventStream",
        "GatewayVersionMismatch",
        "ResourcesUpdated",
        "TunInterfaceUpdated",
    ),
    "firezone_tunnel.apps.client.session": ("Connected", "Session"),
    "firezone_tunnel.errors": (
        "AuthenticationError",
        "ConfigurationError",
        "FirezoneError",
        "PlatformError",
        "PortalError",
        "SessionClosed",
    ),
    "firezone_tunnel.apps.gateway.service": ("GatewayService",),
    "firezone_tunnel.apps.portal.service": ("PortalService",),
    "firezone_tunnel.apps.relay.service": ("RelayService",),
    "firezone_tunnel.core.tunnel.resources": ("ResourceView",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take any name for an attribute of type Any

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
