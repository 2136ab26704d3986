"""Evidence against a promise of differential privacy, and lower bounds on ε: pure functions of what was observed."""
