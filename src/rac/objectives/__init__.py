"""Training objectives: pure functions that return named, unweighted terms. Weights live in the recipes."""
