"""Model and batch to log-probs: caches, attention, products, heads, shared prompts."""
