"""Core attention: one interface, its backends, and the choice among them."""
