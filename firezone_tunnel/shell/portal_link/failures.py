"""Why a portal can't be reached and what the operator can do about it, for the log and for `diagnose`."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from OpenSSL import SSL
from service_identity import VerificationError

from firezone_tunnel.errors import one_line

_CHECK_CERTIFICATE = "check the portal's certificate, or pass its CA with --ca-file"
_CHECK_TLS = "check the scheme and port of --api-url: what answers there does not speak TLS as we do"
_CHECK_NETWORK = "check --api-url, name resolution and the firewall"
_NOT_TRUSTED = "certificate verify failed"


class Explanation(NamedTuple):
    """One line each."""

    reason: str
    advice: str


def explain(error: BaseException) -> Explanation:
    """Explain why a connection to the portal could not be made."""
    return explain_tls(error) or Explanation(_text(error), _CHECK_NETWORK)


def explain_tls(error: BaseException | None) -> Explanation | None:
    """Explain why TLS failed, in pyOpenSSL or in the standard library. None for any other error."""
    if isinstance(error, VerificationError):
        return Explanation("TLS: the portal's certificate is for another host", _CHECK_CERTIFICATE)
    if isinstance(error, ssl.SSLCertVerificationError):
        return Explanation(f"TLS: {_NOT_TRUSTED}: {error.verify_message}", _CHECK_CERTIFICATE)
    if isinstance(error, ssl.SSLError):
        return Explanation(f"TLS: {(error.reason or _text(error)).replace('_', ' ').lower()}", _CHECK_TLS)
    if not isinstance(error, SSL.Error):
        return None
    entries = error.args[0] if error.args and isinstance(error.args[0], list | tuple) else []
    reason = "; ".join(str(entry[-1]) for entry in entries if entry) or one_line(error)
    return Explanation(f"TLS: {reason}", _CHECK_CERTIFICATE if _NOT_TRUSTED in reason else _CHECK_TLS)


def _text(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error)
