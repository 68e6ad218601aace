"""``mlx-cpo bench``: mlx-lm-lora's own CPO trainer and this one, measured alternately on the same work."""
