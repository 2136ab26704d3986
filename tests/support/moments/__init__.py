"""A kind of leak in four files, as a user adds one: what is seen, who replies, an attack, and the question."""
