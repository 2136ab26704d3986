"""The frame: what can be seen, who listens, how a federation is played, and how guesses are scored."""
