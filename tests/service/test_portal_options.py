"""The portal's command line, and its TLS."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import pytest_twisted
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from twisted.internet import reactor, ssl
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol, wrapClientTLS
from twisted.python.usage import UsageError

from firezone_tunnel.apps.portal.options import Options
from firezone_tunnel.apps.portal.service import PortalService
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import ConfigurationError
from tests.service.portal_peers import CLIENT_TOKEN, SEED, Collector, Peer, Refusal, start_portal, stop_portal, until
from tests.service.portal_peers import key as key_of


def test_only_the_seed_must_be_given() -> None:
    options = _parse("--seed", "portal.toml")

    assert options["listen"] == SocketAddress("127.0.0.1", 8081)
    assert options["database"] == "firezone-portal.sqlite3"


def test_the_environment_supplies_missing_options() -> None:
    environment = {"FIREZONE_PORTAL_SEED": "a.toml", "FIREZONE_PORTAL_LISTEN": "[::1]:9000"}

    options = Options(environment)
    options.parseOptions(["--seed", "b.toml"])

    assert (options["seed"], options["listen"]) == ("b.toml", SocketAddress("::1", 9000))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--seed"),
        (("--seed", "x", "--listen", "localhost"), "--listen"),
        (("--seed", "x", "--log-level", "loud"), "--log-level"),
        (("--seed", "x", "--log-format", "xml"), "--log-format"),
    ],
)
def test_an_invalid_option_is_a_usage_error(arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        _parse(*arguments)


@pytest_twisted.ensureDeferred
async def test_it_serves_tls_with_the_given_certificate(tmp_path: Path) -> None:
    certificate, key = _certificate(tmp_path)
    portal = await start_portal(tmp_path, tls_cert=str(certificate), tls_key=str(key))

    trusted = ssl.Certificate.loadPEM(certificate.read_bytes())
    endpoint = TCP4ClientEndpoint(reactor, portal.address.host, portal.address.port)
    secure = wrapClientTLS(ssl.optionsForClientTLS("portal.test", trustRoot=trusted), endpoint)
    protocol: Any = await connectProtocol(secure, Collector())
    protocol.transport.write(b"GET /healthz HTTP/1.1\r\nHost: portal.test\r\n\r\n")

    assert Refusal(await protocol.finished).status == 200
    query = urlencode({"token": CLIENT_TOKEN, "external_id": "one", "public_key": key_of(1)})
    peer = await Peer.open(portal.address, f"/client/websocket?{query}", "connlib/1.5.3", {}, secure)
    peer.topic = "client"
    peer.send("phx_join", None)
    assert (await peer.receive("init"))["interface"]
    peer.abort()
    await until(lambda: peer.closed_with)
    await stop_portal(portal)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("cert.pem", None), "TLS needs both --tls-cert and --tls-key, but only one is given"),
        (("gone.pem", "key.pem"), "can't read .*gone.pem: No such file or directory"),
        (("key.pem", "cert.pem"), "are not a certificate and its private key in PEM format"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_an_invalid_certificate_is_reported_in_one_sentence(
    tmp_path: Path, names: tuple[str | None, str | None], complaint: str
) -> None:
    _certificate(tmp_path)
    cert, key = (str(tmp_path / name) if name else None for name in names)

    await _fails(tmp_path, SEED, complaint, tls_cert=cert, tls_key=key)


@pytest_twisted.ensureDeferred
async def test_an_invalid_seed_is_reported_in_one_sentence(tmp_path: Path) -> None:
    await _fails(tmp_path, "[account", f"the seed file {tmp_path}/portal.toml is invalid: not valid TOML in line 1")


@pytest_twisted.ensureDeferred
async def test_a_missing_seed_is_reported_in_one_sentence(tmp_path: Path) -> None:
    await _fails(tmp_path, None, f"can't read the seed file {tmp_path}/portal.toml: No such file or directory")


async def _fails(directory: Path, seed: str | None, complaint: str, **options: Any) -> None:
    if seed is not None:
        (directory / "portal.toml").write_text(seed)
    service = PortalService(
        reactor,
        listen=SocketAddress("127.0.0.1", 0),
        seed_path=str(directory / "portal.toml"),
        database=str(directory / "portal.sqlite3"),
        **options,
    )
    service.startService()
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        await service.ready
    assert "\n" not in str(raised.value)
    await service.stopService()


def _parse(*arguments: str) -> Options:
    options = Options({})
    options.parseOptions(arguments)
    return options


def _certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for portal.test and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "portal.test")])
    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + datetime.timedelta(days=3))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("portal.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "cert.pem", directory / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
