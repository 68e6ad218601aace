"""The embedded demonstration: a tiny chat model, preference rows and a config, run by ``mlx-cpo demo``."""
