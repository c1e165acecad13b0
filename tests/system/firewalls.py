"""Rule sets of other programs, whose forward chains drop packets."""

from __future__ import annotations

DOCKER = """
table ip filter {
    chain DOCKER-USER { }
    chain FORWARD { type filter hook forward priority filter; policy drop; jump DOCKER-USER; }
}
"""
UFW = """
table ip filter {
    chain FORWARD { type filter hook forward priority filter; policy drop; }
}
table ip6 filter {
    chain FORWARD { type filter hook forward priority filter; policy drop; }
}
"""
