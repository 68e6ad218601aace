"""Proof that a device computes what it should: every way to a gradient, compared with float64."""
