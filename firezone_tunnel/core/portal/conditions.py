"""Conditions of a policy (docs/protocol/portal-protocol.md, 3.12): where a client connects from, and when."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, time, timedelta, tzinfo
from typing import Protocol

import attrs

from firezone_tunnel.core.messages.common import Network
from firezone_tunnel.core.portal.networks import parse_network

_DAYS = "MTWRFSU"  # Monday to Sunday
_KNOWN = "remote_ip is_in_cidr, remote_ip is_not_in_cidr, current_utc_datetime is_in_day_of_week_time_ranges"
_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?")
_DAY_SECONDS = 24 * 3600
_DAYS_AHEAD = 8  # a window that never ends is found after one week


@attrs.frozen
class Circumstances:
    """The facts that conditions are evaluated against."""

    remote_ip: str
    utc_now: float


class Condition(Protocol):
    """A condition: whether it holds, and when it stops holding at the latest (unix time; None: no known end)."""

    @property
    def property_name(self) -> str: ...

    def holds(self, circumstances: Circumstances) -> bool: ...

    def ends_at(self, circumstances: Circumstances) -> int | None: ...


@attrs.frozen
class RemoteAddress:
    """The address that the portal sees is in one of these networks, or in none."""

    networks: tuple[Network, ...]
    negated: bool
    property_name: str = "remote_ip"

    def holds(self, circumstances: Circumstances) -> bool:
        address = ipaddress.ip_address(circumstances.remote_ip)
        return any(address in network for network in self.networks) is not self.negated

    def ends_at(self, circumstances: Circumstances) -> int | None:
        return None


@attrs.frozen
class Window:
    """A weekday (Monday is 0) and seconds of that day, the end exclusive, in a time zone."""

    weekday: int
    begins: int
    ends: int
    zone: tzinfo


@attrs.frozen
class TimeWindows:
    """The current time is in one of these windows; adjoining windows count as one."""

    windows: tuple[Window, ...]
    property_name: str = "current_utc_datetime"

    def holds(self, circumstances: Circumstances) -> bool:
        return self._end_of_window_at(circumstances.utc_now) is not None

    def ends_at(self, circumstances: Circumstances) -> int | None:
        latest = circumstances.utc_now + _DAYS_AHEAD * _DAY_SECONDS
        end = self._end_of_window_at(circumstances.utc_now)
        while end is not None and end < latest:
            following = self._end_of_window_at(end)
            if following is None:
                return int(end)
            end = following
        return None

    def _end_of_window_at(self, moment: float) -> float | None:
        ends = (_end_if_inside(window, moment) for window in self.windows)
        return max((end for end in ends if end is not None), default=None)


def _end_if_inside(window: Window, moment: float) -> float | None:
    local = datetime.fromtimestamp(moment, window.zone)
    second = local.hour * 3600 + local.minute * 60 + local.second
    if local.weekday() != window.weekday or not window.begins <= second < window.ends:
        return None
    day = local.date() + timedelta(days=window.ends // _DAY_SECONDS)
    end = window.ends % _DAY_SECONDS
    clock = time(end // 3600, end // 60 % 60, end % 60)
    return datetime.combine(day, clock, window.zone).astimezone(UTC).timestamp()


def parse_condition(
    property_name: str, operator: str, values: Iterable[str], zone: Callable[[str], tzinfo]
) -> Condition:
    """Parse a condition in the notation of Firezone's portal; `zone` finds a time zone by its name.

    Raises: ValueError, with a message for the operator.
    """
    match property_name, operator:
        case "remote_ip", "is_in_cidr" | "is_not_in_cidr":
            networks = tuple(map(parse_network, values))
            return RemoteAddress(networks=networks, negated=operator == "is_not_in_cidr")
        case "current_utc_datetime", "is_in_day_of_week_time_ranges":
            return TimeWindows(windows=tuple(window for value in values for window in _parse_windows(value, zone)))
    raise ValueError(f"the condition {property_name!r} {operator!r} is unknown (known: {_KNOWN})")


def _parse_windows(text: str, zone: Callable[[str], tzinfo]) -> list[Window]:
    """`D/range,range/timezone`: `M/09:00-12:00,13:00-17:30/UTC`, or `S/true/UTC` for the whole day."""
    day, _, rest = text.partition("/")
    ranges, _, zone_name = rest.partition("/")
    if len(day) != 1 or day not in _DAYS or not ranges or not zone_name:
        raise ValueError(f"{text!r} is not of the form D/HH:MM-HH:MM/timezone, D one of {' '.join(_DAYS)}")
    where = zone(zone_name)
    if ranges == "true":
        return [Window(_DAYS.index(day), 0, _DAY_SECONDS, where)]
    windows = []
    for span in ranges.split(","):
        begins, _, ends = span.partition("-")
        window = Window(_DAYS.index(day), _parse_time(begins), _parse_time(ends), where)
        if window.begins >= window.ends:
            raise ValueError(f"{span!r} ends before it begins")
        windows.append(window)
    return windows


def _parse_time(text: str) -> int:
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a time of day (HH, HH:MM or HH:MM:SS)")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if minutes > 59 or seconds > 59 or total > _DAY_SECONDS:
        raise ValueError(f"{text!r} is not a time of day")
    return total
