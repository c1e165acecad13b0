"""What the portal decides, without I/O: who may connect, who may reach what, through which gateway and relays."""
