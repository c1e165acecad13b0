"""Structured logs through eliot: `events` to write them, `writer` to carry them out of the process."""
