"""The connection of client, gateway and relay to their portal: a service of its own beside the tunnel's."""
