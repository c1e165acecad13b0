"""Structured logging with eliot: `events` logs messages, `writer` writes them to a stream."""
