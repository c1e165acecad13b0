"""Writing log messages: levels and the threshold."""

from __future__ import annotations

from typing import Any

import pytest

from firezone_tunnel.shell.logs import events as log


@pytest.mark.parametrize(
    ("threshold", "levels"),
    [
        (log.DEBUG, ["debug", "info", "warning", "error"]),
        (log.INFO, ["info", "warning", "error"]),
        (log.WARNING, ["warning", "error"]),
        (log.ERROR, ["error"]),
    ],
)
def test_messages_below_the_threshold_are_not_written(
    logged: list[dict[str, Any]], threshold: int, levels: list[str]
) -> None:
    log.set_threshold(threshold)

    for write in (log.debug, log.info, log.warning, log.error):
        write("area:happened", cid="abc", count=3)

    assert [message["level"] for message in logged] == levels
    assert {(message["message_type"], message["cid"], message["count"]) for message in logged} == {
        ("area:happened", "abc", 3)
    }
    assert log.enabled(threshold)
    assert not log.enabled(threshold - 1)
