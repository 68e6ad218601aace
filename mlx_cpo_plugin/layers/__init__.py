"""Layers of a model computed in another way than its own: with less memory, or faster on a CPU."""
