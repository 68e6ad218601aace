"""Model and pairs -> log-probs of the answers."""
