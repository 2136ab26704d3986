"""The frame: what can be seen, what an attack is, how a scenario is played, and how reconstructions are scored."""
