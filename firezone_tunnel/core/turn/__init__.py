"""A TURN client for relays: allocations and their channels (RFC 8656; docs/protocol/data-plane.md, 3)."""
