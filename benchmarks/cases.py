"""The benchmark cases: name, unit, and the peers to compare with."""

from __future__ import annotations

from typing import NamedTuple

OURS = "ours"
REFERENCE = "no-tunnel"
WIREGUARDS = ("wireguard-go-debian", "wireguard-go-newest")
COTURN = "coturn"
OURS_DIRECT = "ours-direct"
"""Our own result in the same run without a relay."""

NATS = ("none", "cone", "fullcone", "symmetric", "double", "cgn", "udp-blocked", "v6-v4")
"""Client and gateway behind every kind of NAT (docs/decisions.md, 8)."""

PING_INTERVALS = {"2ms": 0.002, "10ms": 0.01, "200ms": 0.2, "1s": 1.0}
"""Seconds between the pings of an idle tunnel. The longer a process has slept, the colder its caches are."""

Figures = dict[str, list[float]]
"""The values of one round by case. Short measurements are repeated and have several values."""


class Case(NamedTuple):
    """`direct` names the case of ours that serves as the peer "ours-direct"."""

    name: str
    unit: str
    more_is_better: bool
    peers: tuple[str, ...] = WIREGUARDS
    direct: str | None = None

    def ratio(self, ours: float, peer: float) -> float:
        """The factor by which ours is better."""
        return ours / peer if self.more_is_better else peer / ours


DIRECT_CASES = (
    Case("tcp-1-up", "Gbit/s", more_is_better=True),
    Case("tcp-1-down", "Gbit/s", more_is_better=True),
    Case("tcp-8-up", "Gbit/s", more_is_better=True),
    Case("tcp-8-down", "Gbit/s", more_is_better=True),
    Case("udp-1200-up", "Gbit/s", more_is_better=True),
    *(Case(f"ping-idle-{interval}", "ms", more_is_better=False) for interval in PING_INTERVALS),
    Case("ping-load-p99", "ms", more_is_better=False),
    Case("first-byte", "ms", more_is_better=False),
    Case("cpu-s-per-gb", "s", more_is_better=False),
    Case("rss-client", "MB", more_is_better=False),
    Case("rss-gateway", "MB", more_is_better=False),
    Case("loop-lag-p999", "ms", more_is_better=False, peers=()),
)
RELAYED_CASES = (
    Case("relayed-tcp-1-up", "Gbit/s", more_is_better=True, peers=(COTURN, OURS_DIRECT), direct="tcp-1-up"),
    Case("relayed-tcp-1-down", "Gbit/s", more_is_better=True, peers=(COTURN, OURS_DIRECT), direct="tcp-1-down"),
    Case("relayed-cpu-s-per-gb", "s", more_is_better=False, peers=(COTURN,)),
)
NAT_CASES = tuple(Case(f"nat-first-byte-{kind}", "ms", more_is_better=False, peers=()) for kind in NATS)
RECOVERY_CASES = (
    Case("recover-roaming", "s", more_is_better=False, peers=()),
    Case("recover-relay-death", "s", more_is_better=False, peers=()),
    Case("recover-relay-silent", "s", more_is_better=False, peers=()),
    Case("recover-gateway-restart", "s", more_is_better=False, peers=()),
    Case("recover-portal-restart", "s", more_is_better=False, peers=()),
)
CONTROL_CASES = (
    Case("resources-quiet-ping-p99", "ms", more_is_better=False, peers=()),
    Case("resources-changing-ping-p99", "ms", more_is_better=False, peers=()),
    Case("routes-quiet-ping-p99", "ms", more_is_better=False, peers=()),
    Case("routes-flapping-ping-p99", "ms", more_is_better=False, peers=()),
)
"""With 10,000 resources, without changes and with 1,000 a second; with 20,000 routes in the client's main table."""

CASES = (*DIRECT_CASES, *RELAYED_CASES, *NAT_CASES, *RECOVERY_CASES, *CONTROL_CASES)


def names(cases: tuple[Case, ...]) -> frozenset[str]:
    return frozenset(case.name for case in cases)
