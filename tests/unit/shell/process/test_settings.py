"""Options: the sources of their values, and their syntax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.python.usage import UsageError

from firezone_tunnel.apps.client.options import Options as ClientOptions
from firezone_tunnel.apps.gateway.options import Options as GatewayOptions
from firezone_tunnel.apps.portal.options import Options as PortalOptions
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.shell.logs.events import DEBUG, ERROR, INFO, WARNING
from firezone_tunnel.shell.process.settings import (
    Options,
    Setting,
    parse_address,
    parse_duration,
    parse_interface,
    parse_level,
)


class Example(Options):
    settings = (
        Setting("name", "a name", variables=("NAME", "OLD_NAME"), default="nobody", short="n"),
        Setting("count", "a number", variables=("COUNT",), parse=int),
        Setting("quiet", "whether to be quiet", variables=("QUIET",), is_flag=True),
    )


class Demanding(Options):
    settings = (Setting("seed", "a file", variables=("SEED",), is_required=True),)


def test_settings_have_defaults() -> None:
    options = _parse(Example)

    assert (options["name"], options["count"], options["quiet"]) == ("nobody", None, False)


def test_the_environment_wins_over_the_default_and_the_command_line_over_both() -> None:
    environment = {"NAME": "variable", "COUNT": "3", "QUIET": "yes"}

    assert _parse(Example, **environment)["name"] == "variable"
    assert _parse(Example, "--name", "flag", **environment)["name"] == "flag"
    assert _parse(Example, "-n", "flag", **environment)["name"] == "flag"
    assert _parse(Example, **environment)["count"] == 3
    assert _parse(Example, **environment)["quiet"] is True


@pytest.mark.parametrize("options", [Example, ClientOptions, GatewayOptions])
def test_a_value_that_is_not_text_is_refused_and_a_path_is_not(options: type[Options]) -> None:
    name = "name" if options is Example else "firezone-name"
    not_text = b"caf\xe9".decode(errors="surrogateescape")

    with pytest.raises(UsageError, match=f"--{name}: the value is not UTF-8 text"):
        _parse(options, f"--{name}", not_text)
    if options is not Example:
        assert _parse(options, "--log-dir", not_text)["log-dir"] == Path(not_text)


def test_the_first_variable_that_says_something_counts() -> None:
    assert _parse(Example, NAME="new", OLD_NAME="old")["name"] == "new"
    assert _parse(Example, NAME="", OLD_NAME="old")["name"] == "old"


def test_an_empty_variable_says_nothing() -> None:
    options = _parse(Example, NAME="", COUNT="", QUIET="")

    assert (options["name"], options["count"], options["quiet"]) == ("nobody", None, False)


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_a_flag_by_variable_reads_as_people_write_it(text: str) -> None:
    assert _parse(Example, QUIET=text)["quiet"] is True


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
def test_the_command_line_overrides_a_flag_by_variable(text: str) -> None:
    assert _parse(Example, QUIET=text)["quiet"] is False
    assert _parse(Example, "--quiet", QUIET=text)["quiet"] is True


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        ((), {"QUIET": "maybe"}, "QUIET: 'maybe' is neither true nor false"),
        ((), {"COUNT": "many"}, "COUNT: "),
        (("--count", "many"), {}, "--count: "),
        (("--colour", "red"), {}, "option --colour not recognized"),
    ],
)
def test_an_invalid_value_is_reported_with_its_source(
    arguments: tuple[str, ...], environment: dict[str, str], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        _parse(Example, *arguments, **environment)


def test_a_missing_required_setting_is_reported_with_its_meaning() -> None:
    with pytest.raises(UsageError, match="--seed is missing: a file"):
        _parse(Demanding)
    assert _parse(Demanding, SEED="a.toml")["seed"] == "a.toml"


@pytest.mark.parametrize("options", [ClientOptions, GatewayOptions, PortalOptions])
def test_a_token_is_not_an_option_and_is_not_repeated(options: type[Options]) -> None:
    for arguments in (("--token=secret",), ("--token", "secret"), ("secret",)):
        with pytest.raises(UsageError) as raised:
            _parse(options, *arguments)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("options", [ClientOptions, GatewayOptions, PortalOptions])
def test_help_names_every_option_with_its_variables_and_default(options: type[Options]) -> None:
    text = " ".join(str(options({})).split())

    for setting in options.settings:
        assert f"--{setting.name}" in text
        assert [name for name in setting.variables if name not in text] == []
        assert setting.default is None or f"[default: {setting.default}]" in text.replace("- ", "-")


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("debug", DEBUG),
        ("INFO", INFO),
        ("warn", WARNING),
        ("warning", WARNING),
        ("error", ERROR),
        ("trace", DEBUG),
        ("off", ERROR),
        ("connlib=debug,phoenix_channel=trace,warn", WARNING),
        ("warn,connlib=debug", WARNING),
        ("connlib=trace", INFO),
    ],
)
def test_a_level_may_be_a_list_of_directives_as_in_rust_log(text: str, level: int) -> None:
    assert parse_level(text) == level
    assert _parse(ClientOptions, RUST_LOG=text)["log-level"] == level


def test_our_own_variable_for_the_level_wins_over_rust_log() -> None:
    assert _parse(ClientOptions, FIREZONE_LOG_LEVEL="error", RUST_LOG="debug")["log-level"] == ERROR


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("24h", 86400), ("30d", 2592000), ("1h 30m", 5400), ("1h30m", 5400), (" 5m ", 300)],
)
def test_a_duration_reads_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "m", "-5m", "5 minutes", "1.5h", "5m x"])
def test_text_that_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@given(st.text(max_size=20))
def test_parsers_raise_nothing_but_usage_errors(text: str) -> None:
    for parse in (parse_duration, parse_level, parse_address, parse_interface):
        try:
            parse(text)
        except ValueError:
            continue


def test_an_address_may_be_off() -> None:
    assert parse_address("[::1]:8080") == SocketAddress("::1", 8080)
    assert parse_address("off") is None


@pytest.mark.parametrize("text", ["tun-firezone", "wg0", "fz.1", "a" * 15, "é" * 7])
def test_a_valid_interface_name_is_taken_as_it_is(text: str) -> None:
    assert parse_interface(text) == text


@pytest.mark.parametrize("options", [ClientOptions, GatewayOptions])
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a" * 16, "too long for a network interface: at most 15 bytes"),
        ("é" * 8, "too long"),
        ("a/b", "can't be the name of a network interface"),
        ("a b", "can't be the name"),
        ("a\tb", "can't be the name"),
        ("eth0:1", "can't be the name"),
        ("tun%d", "can't be the name"),
        ("..", "can't be the name"),
    ],
)
def test_an_interface_name_that_the_kernel_refuses_is_refused_at_once(
    options: type[Options], text: str, complaint: str
) -> None:
    with pytest.raises(UsageError, match=f"^--interface: .*{complaint}"):
        _parse(options, "--interface", text)
    with pytest.raises(UsageError, match=f"^FIREZONE_INTERFACE: .*{complaint}"):
        _parse(options, FIREZONE_INTERFACE=text)


def test_client_and_gateway_keep_the_names_and_defaults_of_upstream() -> None:
    client, gateway = _parse(ClientOptions), _parse(GatewayOptions)

    assert client["token-path"] == Path("/etc/dev.firezone.client/token")
    assert client["state-dir"] == Path("/var/lib/dev.firezone.client/config")
    assert client["max-partition-time"] is None
    assert gateway["state-dir"] == Path("/var/lib/firezone")
    assert gateway["max-partition-time"] == 86400
    assert gateway["health-check-addr"] == SocketAddress("0.0.0.0", 8080)
    assert client["interface"] == gateway["interface"] == "tun-firezone"


@pytest.mark.parametrize("options", [ClientOptions, GatewayOptions, PortalOptions])
def test_the_log_directory_comes_by_option_or_by_its_old_variable(options: type[Options]) -> None:
    seed = () if options is not PortalOptions else ("--seed", "portal.toml")

    assert _parse(options, *seed)["log-dir"] is None
    assert _parse(options, *seed, LOG_DIR="/var/log/x")["log-dir"] == Path("/var/log/x")
    assert _parse(options, *seed, "-l", "/tmp/y", LOG_DIR="/var/log/x")["log-dir"] == Path("/tmp/y")


def _parse(kind: type[Options], *arguments: str, **environment: str) -> Any:
    options = kind(environment)
    options.parseOptions(list(arguments))
    return options
