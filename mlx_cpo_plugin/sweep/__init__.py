"""``mlx-cpo sweep``: many runs of one configuration, and which of its settings is the best."""
