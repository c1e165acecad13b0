"""`diagnose` and the running program explain a failed connection to the portal in the same way."""

from __future__ import annotations

import ssl

import pytest
from OpenSSL import SSL

from firezone_tunnel.shell.portal_link.failures import explain

CERTIFICATE = "check the portal's certificate, or pass its CA with --ca-file"


def _untrusted() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "…")
    error.verify_message = "self-signed certificate"
    return error


@pytest.mark.parametrize(
    ("error", "reason", "advice"),
    [
        (_untrusted(), "TLS: certificate verify failed: self-signed certificate", CERTIFICATE),
        (SSL.Error([("SSL routines", "", "certificate verify failed")]), "TLS: certificate verify failed", CERTIFICATE),
        (SSL.Error([("SSL routines", "", "wrong version number")]), "TLS: wrong version number", "check the scheme"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused", "check --api-url"),
        (TimeoutError(), "TimeoutError", "check --api-url"),
    ],
)
def test_each_failure_has_a_reason_and_advice(error: Exception, reason: str, advice: str) -> None:
    explained = explain(error)

    assert explained.reason == reason
    assert explained.advice.startswith(advice)
