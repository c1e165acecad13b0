"""The exception tree, and the operating system's errors that only mean "not reachable from here".

This is the lowest layer: every module may import it, and it imports none of the package.
"""

from __future__ import annotations

import errno


class FirezoneError(Exception):
    """The base class. The text is one sentence: what failed, on what, and what the operator can do."""

    exit_code = 1


class ConfigurationError(FirezoneError):
    """An option, a file or a token is missing or wrong."""


class PlatformError(FirezoneError):
    """The host lacks a device node, a capability, a free port, disk space or the like."""


class InUseError(PlatformError):
    """Another instance owns a resource of the host that this one needs."""


class InternalError(FirezoneError):
    """A bug ended a service. `traceback` is the text of the original exception's traceback."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class ProtocolError(FirezoneError):
    """A peer sent bytes that violate its protocol."""


class PortalError(FirezoneError):
    """The portal refused the connection for good: retrying cannot help."""


class AuthenticationError(PortalError):
    """The portal refused the token. If `requires_sign_in`, discard the token."""

    def __init__(self, message: str, *, requires_sign_in: bool) -> None:
        super().__init__(message)
        self.requires_sign_in = requires_sign_in


class SessionClosed(FirezoneError):
    """The session has ended and can't be used again: connect a new one."""


_UNREACHABLE = frozenset(
    {
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
        errno.EADDRNOTAVAIL,
        errno.EAFNOSUPPORT,
        errno.EINVAL,
    }
)


def is_unreachable(error: OSError) -> bool:
    """Whether a failed send only means that the address can't be reached from here.

    Log such an error at DEBUG (docs/protocol/data-plane.md, 7.7). This does not apply to a send with UDP_SEGMENT, where
    EINVAL means that the path refuses GSO.
    """
    return error.errno in _UNREACHABLE


def one_line(error: BaseException) -> str:
    """The error and its causes, outermost first, joined by ": "."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 8:
        text = str(cause) or type(cause).__name__
        if not parts or text not in parts[-1]:
            parts.append(" ".join(text.split()))
        cause = cause.__cause__
    return ": ".join(parts)
