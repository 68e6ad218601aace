"""Adapters and training states on disk, whole or absent."""
