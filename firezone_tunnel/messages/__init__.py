"""What portal, client, gateway and relay say to each other over the Phoenix channel (spec/portal-protocol.md, 2).

Both sides use these types: the portal to build what the others parse, and the other way round. Each message
class names its events: the seed's first, today's second where it differs.
"""
