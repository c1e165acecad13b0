"""The messages between the portal and clients, gateways and relays (docs/protocol/portal-protocol.md, 2).

Both sides use these types: one side builds a message, the other parses it. Each message class lists the names of its
event, that of V1 first, that of V2 last (`common.Generation`).
"""
