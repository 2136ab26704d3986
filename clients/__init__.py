"""Who replies to a server: honest clients, the compromised one, and those of other leaks than gradients."""
