"""A Firezone-compatible zero-trust tunnel: client, gateway, relay and portal.

The public names resolve lazily (PEP 562): importing this package loads neither a reactor nor an
application. `firezone_tunnel.aio` has the same names as coroutines, for asyncio programs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    **dict.fromkeys(("Connected", "Session"), "firezone_tunnel.apps.client.session"),
    **dict.fromkeys(
        (
            "AllGatewaysOffline",
            "Disconnected",
            "Event",
            "EventStream",
            "GatewayVersionMismatch",
            "ResourcesUpdated",
            "TunInterfaceUpdated",
        ),
        "firezone_tunnel.apps.client.events",
    ),
    "ResourceView": "firezone_tunnel.core.tunnel.resources",
    **dict.fromkeys(
        ("AuthenticationError", "ConfigurationError", "FirezoneError", "PlatformError", "PortalError", "SessionClosed"),
        "firezone_tunnel.errors",
    ),
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604  # these are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
