"""Policy conditions: whether they hold, and until when."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo

import pytest

from firezone_tunnel.core.portal.conditions import Circumstances, Condition, parse_condition


def _zone(name: str) -> tzinfo:
    return ZoneInfo(name)


def _at(text: str, address: str = "192.0.2.7") -> Circumstances:
    return Circumstances(address, datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def _windows(*values: str) -> Condition:
    return parse_condition("current_utc_datetime", "is_in_day_of_week_time_ranges", values, _zone)


@pytest.mark.parametrize(
    ("operator", "address", "holds"),
    [
        ("is_in_cidr", "192.0.2.7", True),
        ("is_in_cidr", "192.0.3.7", False),
        ("is_in_cidr", "2001:db8::7", True),
        ("is_not_in_cidr", "192.0.2.7", False),
        ("is_not_in_cidr", "2001:db9::7", True),
    ],
)
def test_remote_address(operator: str, address: str, holds: bool) -> None:
    condition = parse_condition("remote_ip", operator, ["192.0.2.0/24", "2001:db8::/32"], _zone)

    assert condition.holds(_at("2026-11-24T12:00", address)) is holds
    assert condition.ends_at(_at("2026-11-24T12:00", address)) is None


@pytest.mark.parametrize(
    ("moment", "holds"),
    [
        ("2026-11-24T08:59:59", False),  # a Tuesday
        ("2026-11-24T09:00:00", True),
        ("2026-11-24T16:59:59", True),
        ("2026-11-24T17:00:00", False),
        ("2026-11-25T12:00:00", False),
    ],
)
def test_a_window_begins_inclusively_and_ends_exclusively(moment: str, holds: bool) -> None:
    assert _windows("T/09-17:00/UTC").holds(_at(moment)) is holds


def test_a_window_ends_when_it_says() -> None:
    end = _windows("T/09:00-12:00,13:00-17:30/UTC").ends_at(_at("2026-11-24T13:30:00"))

    assert end == _at("2026-11-24T17:30:00").utc_now


def test_adjoining_windows_end_together_also_over_midnight() -> None:
    end = _windows("T/09:00-12:00,12:00-24:00/UTC", "W/00:00-01:00/UTC").ends_at(_at("2026-11-24T10:00:00"))

    assert end == _at("2026-11-25T01:00:00").utc_now


def test_overlapping_windows_end_with_the_last() -> None:
    end = _windows("T/09:00-12:00/UTC", "T/11:00-15:00/UTC").ends_at(_at("2026-11-24T10:00:00"))

    assert end == _at("2026-11-24T15:00:00").utc_now


def test_all_week_never_ends() -> None:
    assert _windows(*(f"{day}/true/UTC" for day in "MTWRFSU")).ends_at(_at("2026-11-24T10:00:00")) is None


def test_a_window_is_in_its_own_time_zone() -> None:
    condition = _windows("T/09:00-17:00/Europe/Berlin")

    assert condition.holds(_at("2026-11-24T08:30:00"))
    assert not condition.holds(_at("2026-11-24T16:30:00"))
    assert condition.ends_at(_at("2026-11-24T08:30:00")) == _at("2026-11-24T16:00:00").utc_now


@pytest.mark.parametrize(
    "value",
    ["", "T", "X/09-17/UTC", "T/09-17", "T/17-09/UTC", "T/9:5-17/UTC", "T/25-26/UTC", "T/09:60-10/UTC", "T/a-b/UTC"],
)
def test_an_invalid_window_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"form|before|time of day"):
        _windows(value)


def test_an_unknown_condition_says_so() -> None:
    with pytest.raises(ValueError, match="client_verified"):
        parse_condition("client_verified", "is", ["true"], _zone)
