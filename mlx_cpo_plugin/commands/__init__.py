"""The commands that neither train nor start an application."""
