"""A TURN client for relays: allocations and their channels (RFC 8656; spec/data-plane.md, 3)."""
