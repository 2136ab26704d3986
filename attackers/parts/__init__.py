"""Pure functions that several attacks share: gradients, labels, priors, solvers."""
