"""Options, each declared once: flag, environment variables, `--help` and the reference page are made from it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
from twisted.python.usage import Options as TwistedOptions
from twisted.python.usage import UsageError

from firezone_tunnel import __version__
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import ConfigurationError
from firezone_tunnel.shell.logs.events import LEVELS
from firezone_tunnel.shell.logs.writer import FORMATS
from firezone_tunnel.shell.portal_link.url import DEFAULT_BASE


@attrs.frozen
class Setting:
    """One option. On the command line it wins over the environment; `parse` raises ValueError."""

    name: str
    help: str
    variables: tuple[str, ...] = ()
    default: str | None = None
    parse: Callable[[str], Any] = str
    short: str | None = None
    is_flag: bool = False
    is_required: bool = False


class Options(TwistedOptions):
    """Options of an application, as `options["name"]`, parsed.

    A wrong option ends a twistd process with one line and code 2.
    """

    settings: ClassVar[tuple[Setting, ...]] = ()
    optParameters: ClassVar[list[list[str | None]]] = []
    optFlags: ClassVar[list[list[str | None]]] = []

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.optParameters = [[one.name, one.short, None, _describe(one)] for one in cls.settings if not one.is_flag]
        cls.optFlags = [[one.name, one.short, _describe(one)] for one in cls.settings if one.is_flag]

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """`environment` replaces the process's own in tests."""
        super().__init__()  # type: ignore[no-untyped-call]  # Twisted has no types here
        self.environment = environment

    def parseOptions(self, options: Any = None) -> None:
        """
        Raises: UsageError; SystemExit with 2 where this is a subcommand of twistd's.
        """
        try:
            self._refuse_abbreviations(sys.argv[1:] if options is None else options)
            super().parseOptions(options)  # type: ignore[no-untyped-call]  # Twisted has no types here
        except UsageError as error:
            if self.parent is None:
                raise
            print(f"{self.parent.subCommand}: {error} (see --help)", file=sys.stderr)
            raise SystemExit(2) from None

    def postOptions(self) -> None:
        for setting in self.settings:
            self[setting.name] = self._value(setting)

    def parseArgs(self, *arguments: str) -> None:
        if arguments:  # never repeated: it may be a token
            raise UsageError("there are options only, no further arguments")

    def opt_version(self) -> None:
        """Display the version and exit."""
        print(__version__)
        raise SystemExit(0)

    def _refuse_abbreviations(self, arguments: Sequence[str]) -> None:
        """getopt would take `--token SECRET` for `--token-path SECRET` and print it in an error."""
        known = {name.removesuffix("=") for name in self.longOpt}
        with_value = {f"--{name[:-1]}" for name in self.longOpt if name.endswith("=")}
        with_value |= {f"-{one.short}" for one in self.settings if one.short and not one.is_flag}
        remaining = iter(arguments)
        for argument in remaining:
            if not argument.startswith("-") or argument == "--":
                return
            name, equals, _ = argument.partition("=")
            if name.startswith("--") and name[2:] not in known:
                raise UsageError(f"option {name} not recognized")
            if name in with_value and not equals:
                next(remaining, None)

    def _value(self, setting: Setting) -> Any:
        given, source = self[setting.name], f"--{setting.name}"
        if setting.is_flag and given:
            return True
        for variable in setting.variables:
            if given is None or given == 0:
                given, source = self.environment.get(variable) or given, variable
        text = given or setting.default
        if setting.is_flag:
            return bool(text) and parse_flag(str(text), source)
        if text is None and setting.is_required:
            raise UsageError(f"--{setting.name} is missing: {setting.help}")
        if text is None:
            return None
        # A path may be any bytes; all else is sent, logged or compared as text.
        if setting.parse is not Path and not _is_text(str(text)):
            raise UsageError(f"{source}: the value is not UTF-8 text")
        try:
            return setting.parse(text)
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from error


def parse_flag(text: str, source: str = "") -> bool:
    """As upstream's users write them.

    Raises: UsageError.
    """
    value = _FLAGS.get(text.strip().lower())
    if value is None:
        raise UsageError(f"{source}: {text!r} is neither true nor false")
    return value


def parse_level(text: str) -> int:
    """A log level, or upstream's list of directives, of which the last one without a target counts.

    Raises: ValueError.
    """
    levels = [directive.strip().lower() for directive in text.split(",") if "=" not in directive]
    name = _LEVEL_ALIASES.get(levels[-1], levels[-1]) if levels else "info"
    if name not in LEVELS:
        raise ValueError(f"{text!r} is not a log level: debug, info, warn or error")
    return LEVELS[name]


def parse_log_format(text: str) -> str:
    """
    Raises: ValueError.
    """
    if text not in FORMATS:
        raise ValueError(f"{text!r} is not a log format: {' or '.join(FORMATS)}")
    return text


def parse_duration(text: str) -> float:
    """Seconds, of "90s", "15m", "24h", "30d", or several in a row such as "1h 30m".

    Raises: ValueError.
    """
    if not re.fullmatch(r"(?:\s*\d+\s*[smhd])+\s*", text):
        raise ValueError(f"{text!r} is not a duration such as 15m, 24h or 30d")
    return float(sum(int(count) * _SECONDS[unit] for count, unit in re.findall(r"(\d+)\s*([smhd])", text)))


def parse_address(text: str) -> SocketAddress | None:
    """An address and port to listen on; "off" for none.

    Raises: ValueError.
    """
    return None if text == "off" else SocketAddress.parse(text)


def parse_interface(text: str) -> str:
    """The name of a network interface (`dev_valid_name` of Linux's net/core/dev.c).

    Raises: ValueError.
    """
    if len(text.encode()) > _INTERFACE_MAX:
        raise ValueError(f"{text!r} is too long for a network interface: at most {_INTERFACE_MAX} bytes")
    if text in {".", ".."} or not text.isprintable() or any(character in "/:% " for character in text):
        raise ValueError(f"{text!r} can't be the name of a network interface: use letters, digits, '-', '_' and '.'")
    return text


LOG_SETTINGS = (
    Setting(
        "log-level",
        "debug, info, warn or error",
        variables=("FIREZONE_LOG_LEVEL", "RUST_LOG"),
        default="info",
        parse=parse_level,
    ),
    Setting("log-format", "human or json", variables=("FIREZONE_LOG_FORMAT",), default="human", parse=parse_log_format),
    Setting("log-dir", "also log to a file in this directory", variables=("LOG_DIR",), parse=Path, short="l"),
)

API_URL = Setting("api-url", "URL of the portal", ("FIREZONE_API_URL",), DEFAULT_BASE, short="u")
FIREZONE_NAME = Setting(
    "firezone-name", "name of this device in the portal; by default the host name", ("FIREZONE_NAME",)
)
CA_FILE = Setting(
    "ca-file", "PEM file of CAs to trust for the portal, instead of the system's", ("FIREZONE_CA_FILE",), parse=Path
)
MAX_PARTITION_TIME = Setting(
    "max-partition-time",
    "exit after this long without the portal, such as 15m or 30d",
    variables=("FIREZONE_MAX_PARTITION_TIME",),
    default="24h",
    parse=parse_duration,
    short="m",
)
HEALTH_CHECK_ADDR = Setting(
    "health-check-addr",
    "address and port for /healthz and /readyz; off disables them",
    variables=("HEALTH_CHECK_ADDR",),
    default="0.0.0.0:8080",
    parse=parse_address,
)


def token_path(default: str) -> Setting:
    """For `read_token`."""
    text = "file with the token, readable only by its owner"
    return Setting("token-path", text, ("FIREZONE_TOKEN_PATH",), default, parse=Path)


def device_settings(*, interface: str, token: str, state_directory: str) -> tuple[Setting, ...]:
    """The settings that client and gateway share, with the defaults of either."""
    # `interface` is `tun.device.DEFAULT_NAME`: it isn't imported here, as the portal would load numpy with it.
    state = "directory for state that survives restarts"
    telemetry = "accepted for compatibility with Firezone; telemetry is never sent"
    return (
        API_URL,
        Setting("firezone-id", "identity of this device; by default the stored identity", ("FIREZONE_ID",), short="i"),
        FIREZONE_NAME,
        CA_FILE,
        Setting("interface", "name of the TUN device", ("FIREZONE_INTERFACE",), interface, parse=parse_interface),
        Setting("no-telemetry", telemetry, ("FIREZONE_NO_TELEMETRY",), is_flag=True),
        token_path(token),
        Setting("state-dir", state, ("FIREZONE_STATE_DIR",), state_directory, parse=Path),
    )


def read_token(environment: MutableMapping[str, str], path: Path) -> str:
    """The token: of FIREZONE_TOKEN, which is then gone from the environment; of a systemd credential of that name; of a
    file that only its owner may read.

    Raises: ConfigurationError.
    """
    token = environment.pop("FIREZONE_TOKEN", "").strip()
    credentials = environment.get("CREDENTIALS_DIRECTORY")
    if not token and credentials:
        token = _read(Path(credentials) / "FIREZONE_TOKEN")
    if not token:
        check_private(path, "token file")
        token = _read(path)
    if not token:
        raise ConfigurationError(
            f"No token is configured: set FIREZONE_TOKEN, or put it into {path}, readable by its owner only"
        )
    return token


def check_private(path: Path, what: str) -> None:
    """Refuse a file with secrets that others can read. `what` is its name in the error. A missing file passes.

    Raises: ConfigurationError.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigurationError(f"Can't look at the {what} {path}: {error.strerror}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o177:
        raise ConfigurationError(
            f"The {what} {path} must belong to the user that runs this program, with mode 600: chmod 600 {path}"
        )


def _read(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigurationError(f"Can't read the token in {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        # Without its cause, which quotes what was read.
        raise ConfigurationError(f"The token file {path} does not hold a token: it is not UTF-8 text") from None


def _is_text(value: str) -> bool:
    """Whether a value of the command line or the environment is UTF-8: Python keeps other bytes as surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(setting: Setting) -> str:
    default = f" [default: {setting.default}]" if setting.default is not None else ""
    variables = f" ({', '.join(setting.variables)})" if setting.variables else ""
    return f"{setting.help}{default}{variables}"


_INTERFACE_MAX = 15  # IFNAMSIZ - 1 (<linux/if.h>)
_FLAGS: Mapping[str, bool] = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off", ""), False),
}
_LEVEL_ALIASES = {"trace": "debug", "off": "error", "warning": "warn", "": "info"}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
