"""The portal's decisions, without I/O: who may connect, who may reach what, through which gateway and relays."""
