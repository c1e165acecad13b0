"""Who may open a socket: the request's path, token and parameters (docs/protocol/portal-protocol.md, 1.1 to 1.4)."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import attrs

from firezone_tunnel.core.messages.common import Generation
from firezone_tunnel.core.phoenix.codec import Form
from firezone_tunnel.core.portal.account import Account, PeerRole, Token
from firezone_tunnel.core.portal.devices import Identity
from firezone_tunnel.core.portal.versions import UserAgent, parse_user_agent
from firezone_tunnel.core.sansio import SocketAddress

_PATHS = {
    "/client/websocket": (PeerRole.CLIENT, Generation.V1),
    "/client/v2/websocket": (PeerRole.CLIENT, Generation.V2),
    "/gateway/websocket": (PeerRole.GATEWAY, Generation.V1),
    "/gateway/v2/websocket": (PeerRole.GATEWAY, Generation.V2),
    "/relay/websocket": (PeerRole.RELAY, Generation.V1),
}
_FORMS = {"1.0.0": Form.OBJECT, "2.0.0": Form.ARRAY}
_PORT_DIGITS = 5
_RELAY_PORT = 3478
_NAME_LENGTH = 255


class Refused(Exception):
    """The request gets no socket: the problem to answer with (RFC 9457, plus `code`)."""

    def __init__(self, status: int, code: str, detail: str, *, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after = retry_after

    def document(self) -> dict[str, object]:
        """The problem document, as JSON values."""
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }


@attrs.frozen
class UpgradeRequest:
    """An upgrade request. `headers` have lower-case names; `parameters` are the decoded query."""

    path: str
    parameters: Mapping[str, Sequence[str]]
    headers: Mapping[str, str]
    remote_ip: str

    def parameter(self, *names: str) -> str | None:
        """The first value of the first of these parameters that is present."""
        return next((self.parameters[name][0] for name in names if self.parameters.get(name)), None)


@attrs.frozen
class Admitted:
    """An admitted socket. `name` is None if the peer sent no name."""

    role: PeerRole
    generation: Generation
    form: Form
    token: Token
    agent: UserAgent
    user_agent: str
    remote_ip: str
    name: str | None


@attrs.frozen
class AdmittedDevice(Admitted):
    identity: Identity
    public_key: str


@attrs.frozen
class AdmittedRelay(Admitted):
    """At most one address of a family, IPv4 first."""

    addresses: tuple[SocketAddress, ...]


def admit(account: Account, request: UpgradeRequest, utc_now: float) -> AdmittedDevice | AdmittedRelay:
    """Decide about an upgrade request.

    Raises: Refused.
    """
    if request.path not in _PATHS:
        raise Refused(404, "not_found", "The path does not exist.")
    role, generation = _PATHS[request.path]
    form = _FORMS.get(request.parameter("vsn") or "1.0.0")
    if form is None:
        raise Refused(403, "unsupported_vsn", "The vsn is not supported.")
    token = _token(account, request, role, utc_now)
    user_agent = request.headers.get("user-agent", "")
    invalid = _Invalid(generation)
    agent = parse_user_agent(user_agent)
    if agent is None:
        raise invalid("The User-Agent has no known component and version.")
    name = request.parameter("name")
    if name is not None and len(name) > _NAME_LENGTH:
        raise invalid(f"The name is longer than {_NAME_LENGTH} characters.")
    base = (role, generation, form, token, agent, user_agent, request.remote_ip, name)
    if role is PeerRole.RELAY:
        return AdmittedRelay(*base, addresses=_relay_addresses(request, invalid))
    external_id = request.parameter("external_id", "firezone_id")
    if not external_id or len(external_id) > _NAME_LENGTH:
        raise invalid("The external_id is missing or too long.")
    identity = Identity(role, token.owner, external_id)
    return AdmittedDevice(*base, identity=identity, public_key=_public_key(request, invalid))


class _Invalid:
    """Makes the answer to invalid parameters, as the peer's generation expects it."""

    def __init__(self, generation: Generation) -> None:
        self._status = 422 if generation is Generation.V1 else 400

    def __call__(self, detail: str) -> Refused:
        return Refused(self._status, "invalid_connect_params", detail)


def _token(account: Account, request: UpgradeRequest, role: PeerRole, utc_now: float) -> Token:
    """The header takes precedence over the query. Whitespace is not part of the token."""
    scheme, _, header = request.headers.get("x-authorization", "").strip().partition(" ")
    text = "".join((header if scheme.lower() == "bearer" else "").split()) or request.parameter("token")
    if not text:
        raise Refused(401, "missing_token", "The token is missing.")
    token = account.token(role, text, utc_now)
    if token is None:
        raise Refused(401, "invalid_token", "The token is unknown, expired, or not for this path.")
    return token


def _public_key(request: UpgradeRequest, invalid: _Invalid) -> str:
    text = request.parameter("public_key") or ""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 32:
        raise invalid("The public_key is not 32 bytes in base64.")
    return base64.b64encode(raw).decode()


def _relay_addresses(request: UpgradeRequest, invalid: _Invalid) -> tuple[SocketAddress, ...]:
    port = request.parameter("port") or str(_RELAY_PORT)
    if not (len(port) <= _PORT_DIGITS and port.isascii() and port.isdigit() and 0 < int(port) <= 0xFFFF):
        raise invalid("The port is invalid.")
    addresses = []
    for family, name in ((4, "ipv4"), (6, "ipv6")):
        text = request.parameter(name)
        if text is None:
            continue
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise invalid(f"The {name} is not an IP address.") from None
        if address.version != family:
            raise invalid(f"The {name} is not of that family.")
        if "%" in text:  # peers can't parse a scope, and would drop every message that names this relay
            raise invalid(f"The {name} has a scope.")
        addresses.append(SocketAddress(str(address), int(port)))
    if not addresses:
        raise invalid("A relay needs an ipv4 or ipv6 parameter.")
    return tuple(addresses)
