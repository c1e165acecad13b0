"""Where and as whom to connect to a portal: URL, headers, device identity.

See docs/protocol/portal-protocol.md, 1.1 to 1.3.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import platform
import re
import socket
import uuid
from urllib.parse import quote, urlencode, urlsplit

import attrs

from firezone_tunnel import __version__
from firezone_tunnel.errors import ConfigurationError

DEFAULT_BASE = "wss://api.firezone.dev"
DEFAULT_PORT = 443  # whatever the scheme: ws:// without a port means 443, too

CLAIMED_VERSION = "1.5.12"
"""Upstream's version that client and gateway claim: a portal connects those within one minor version only."""
RELAY_AGENT = "relay/0.1.0"


def data_plane_agent() -> str:
    """The User-Agent of client and gateway. A portal reads the version after `connlib/`, and wants ASCII."""
    agent = (
        f"{platform.system()}/{platform.release()} connlib/{CLAIMED_VERSION} "
        f"({platform.machine()}; firezone_tunnel/{__version__})"
    )
    return "".join(character for character in agent if " " <= character <= "~")


def external_id(device_id: str) -> str:
    """A device's identity as the portal sees it: the hash of a UUID's text, any other text unchanged."""
    if _UUID.fullmatch(device_id):
        return hashlib.sha256(device_id.encode()).hexdigest()
    return device_id


def default_name() -> str:
    """The host's name, or a random one where it has none."""
    return socket.gethostname()[:_NAME_MAX] or str(uuid.uuid4())


@attrs.frozen
class LoginUrl:
    """A portal and the login parameters of a role, but for the tunnel's public key, which changes.

    `str()` is the URL without its query, which holds the token, and the only form that belongs into a log.
    """

    host: str  # ASCII name, or IP address without brackets
    port: int
    is_secure: bool
    path: str
    parameters: tuple[tuple[str, str], ...] = attrs.field(repr=False)
    token: str = attrs.field(repr=False)
    user_agent: str

    @classmethod
    def client(
        cls,
        base: str,
        token: str,
        *,
        device_id: str,
        name: str,
        device_serial: str | None = None,
        device_uuid: str | None = None,
    ) -> LoginUrl:
        """
        Raises: ConfigurationError, if the URL or the token can't be used.
        """
        serial = None if device_serial == _DUMMY_SERIAL else device_serial
        return cls._build(
            base,
            "client",
            token,
            data_plane_agent(),
            external_id=external_id(device_id),
            name=name[:_NAME_MAX],
            device_serial=serial,
            device_uuid=device_uuid,
        )

    @classmethod
    def gateway(cls, base: str, token: str, *, device_id: str, name: str) -> LoginUrl:
        """
        Raises: ConfigurationError, if the URL or the token can't be used.
        """
        identity = external_id(device_id)
        return cls._build(base, "gateway", token, data_plane_agent(), external_id=identity, name=name[:_NAME_MAX])

    @classmethod
    def relay(
        cls,
        base: str,
        token: str,
        *,
        ipv4: str | None,
        ipv6: str | None,
        port: int = 3478,
        name: str | None = None,
    ) -> LoginUrl:
        """
        Raises: ConfigurationError, if the URL or the token can't be used, or there is no address.
        """
        if ipv4 is None and ipv6 is None:
            raise ConfigurationError("A relay needs a public IPv4 or IPv6 address to announce to the portal")
        name = name and name[:_NAME_MAX]
        return cls._build(base, "relay", token, RELAY_AGENT, name=name, ipv4=ipv4, ipv6=ipv6, port=str(port))

    def target(self, public_key: bytes | None = None) -> str:
        """Path and query of the upgrade request, form-encoded. Holds the token: never log it."""
        parameters = list(self.parameters)
        if self.token:  # V2 portals read the header first, V1 portals only this
            parameters.insert(0, ("token", self.token))
        if public_key is not None:
            parameters.append(("public_key", base64.b64encode(public_key).decode()))
        return f"{self.path}?{urlencode(parameters)}"

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The headers that are ours to choose. Holds the token: never log it."""
        headers = [("Host", self._host_header), ("User-Agent", self.user_agent)]
        if self.token:
            headers.append(("X-Authorization", f"Bearer {self.token}"))
        return tuple(headers)

    @property
    def _host_header(self) -> str:
        # Upstream's programs send the bare host whatever the port is. Bandit and load balancers take it with and
        # without a port, a strict server (Autobahn's, told its external port) only as RFC 9110, section 7.2, has it:
        # with every port that isn't the scheme's own. On wss and 443 all of them are the same.
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.is_secure else 'ws'}://{host}:{self.port}"

    @property
    def identity(self) -> str | None:
        """The device's identity as the portal sees it. A relay has none."""
        return dict(self.parameters).get("external_id")

    def __str__(self) -> str:
        return f"{self.origin}{self.path}"

    @classmethod
    def _build(cls, base: str, role: str, token: str, user_agent: str, **parameters: str | None) -> LoginUrl:
        host, port, is_secure, path = _parse_base(base)
        return cls(
            host=host,
            port=port,
            is_secure=is_secure,
            path=f"{path}/{role}/websocket",
            parameters=tuple((name, value) for name, value in parameters.items() if value),
            token=_clean_token(token),
            user_agent=user_agent,
        )


def _parse_base(base: str) -> tuple[str, int, bool, str]:
    """Host, port, whether TLS, and the path without trailing slash. Query and fragment are dropped."""
    try:
        parts = urlsplit(base.strip())
        if parts.username is not None:
            raise ConfigurationError(
                "The portal's URL must not contain a user name or password: the token authenticates"
            )
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigurationError(f"The portal's URL {base!r} can't be read: {error}") from None
    if parts.scheme not in _SCHEMES:
        raise ConfigurationError(f"The portal's URL {base!r} must begin with https://, wss://, http:// or ws://")
    if not host:
        raise ConfigurationError(f"The portal's URL {base!r} has no host")
    path = quote(parts.path.removesuffix("/"), safe="/%:@!$&'()*+,;=~")
    return _ascii_host(host, base), DEFAULT_PORT if port is None else port, parts.scheme in _SECURE, path


def _ascii_host(host: str, base: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        name = host.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not _HOST.fullmatch(name):
        raise ConfigurationError(f"The portal's URL {base!r} has no valid host")
    return name


def _clean_token(token: str) -> str:
    """Tokens are pasted: remove white space and line ends anywhere in them."""
    cleaned = "".join(token.split())
    if not all("!" <= character <= "~" for character in cleaned):
        raise ConfigurationError("The token contains invalid characters: check how it was copied")
    return cleaned


_SECURE = ("https", "wss")
_SCHEMES = (*_SECURE, "http", "ws")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})")
_NAME_MAX = 255
_DUMMY_SERIAL = "123456789"  # what boards without a serial number report

_HYPHENATED = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_UUID = re.compile(rf"[0-9a-f]{{32}}|(?:urn:uuid:)?{_HYPHENATED}|\{{{_HYPHENATED}\}}", re.IGNORECASE)
