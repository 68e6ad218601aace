"""A training run, from its pairs to its last adapter."""
