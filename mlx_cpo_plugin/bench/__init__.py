"""``mlx-cpo bench``: mlx-lm-lora's own CPO trainer and this one, measured in turn on the same work."""
