"""One attack a file, named after its paper; `parts` holds the pure functions that several share."""
