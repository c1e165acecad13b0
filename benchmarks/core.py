"""Measure the core without I/O: each step of the packet path, in microseconds per 64 KiB of one TCP flow, and changes.

    python -m benchmarks.core [--json FILE] [--rounds N]

"AEAD" is the time of the bare ChaCha20-Poly1305 calls for the same segments; the rest of a step is our overhead. Each
figure is the best of several rounds, since noise only adds time. Opening decrypts in place and overwrites its input, so
"open" includes the time to copy the datagrams. Whole paths are also shown relative to the bare seal or open step.

A change of a resource or a flow is measured with its reports, in tables as large as those of big accounts: the goal is
1,000 microseconds.
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from timeit import repeat

from benchmarks.core_changes import change_cases
from benchmarks.core_paths import WHOLE_PATHS, path_cases, relay_cases
from benchmarks.core_steps import CALLS, step_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for name, run, prepare in chain(step_cases(), path_cases(), relay_cases(), change_cases()):
        best = min(repeat(run, setup=prepare, number=CALLS, repeat=options.rounds))
        figures[name] = round(best / CALLS * 1e6, 2)
        bare = WHOLE_PATHS.get(name)
        ratio = f"{figures[name] / figures[bare]:8.2f} times {bare}" if bare is not None else ""
        print(f"{name:<42} {figures[name]:8.2f} us{ratio}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
