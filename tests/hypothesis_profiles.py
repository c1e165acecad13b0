"""The number of examples that Hypothesis tries: HYPOTHESIS_PROFILE names one of these profiles.

    developer  half as many as in CI; the default
    ci         the number that the test states, or 100, and the same examples in every run; the default where CI=true
    thorough   twenty times as many as in CI

No profile limits the time of an example: on a busy machine, it depends on the machine.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_IN_CI = 100
_COUNTS = {"developer": _IN_CI // 2, "ci": _IN_CI, "thorough": _IN_CI * 20}


def load_profile() -> None:
    """Register the profiles and load the one for this run."""
    for name, count in _COUNTS.items():
        settings.register_profile(
            name,
            max_examples=count,
            deadline=None,
            derandomize=name == "ci",
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow],
        )
    default = "ci" if os.environ.get("CI") == "true" else "developer"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or default)


def examples(in_ci: int) -> int:
    """Return `max_examples` for a test that tries `in_ci` examples in CI."""
    return max(1, in_ci * settings().max_examples // _IN_CI)
