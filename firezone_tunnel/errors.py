"""The exception tree, and which operating-system errors only say "not reachable from here".

The lowest layer: everything may import it, it imports nothing of ours.
"""

from __future__ import annotations

import errno


class FirezoneError(Exception):
    """The message is one sentence: the attempt, its object, and the remedy."""

    exit_code = 1


class ConfigurationError(FirezoneError):
    """An option, a file or a token is missing or wrong."""


class PlatformError(FirezoneError):
    """The host lacks something: a device node, a capability, a free port, disk space."""


class InUseError(PlatformError):
    """Another instance already owns what this one needs."""


class ProtocolError(FirezoneError):
    """A peer sent bytes that its protocol does not allow."""


class PortalError(FirezoneError):
    """The portal refused us for good: retrying cannot help."""


class AuthenticationError(PortalError):
    """The portal refused the token; `requires_sign_in` says whether to discard it."""

    def __init__(self, message: str, *, requires_sign_in: bool) -> None:
        super().__init__(message)
        self.requires_sign_in = requires_sign_in


class SessionClosed(FirezoneError):
    """The session was closed: it cannot be used again, connect a new one."""


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
    """Whether a failed send only says that this address can't be reached from here.

    Such errors are DEBUG noise (docs/protocol/data-plane.md, 7.7). It is for ordinary sends: of one with UDP_SEGMENT,
    EINVAL says that the path refuses GSO.
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
