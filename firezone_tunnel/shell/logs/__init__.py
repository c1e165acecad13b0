"""Structured logging with eliot: `events` logs messages, `limiter` limits repetitions, `writer` writes to a stream."""
