"""What a run is configured with: command line, YAML and defaults, checked before anything is loaded."""
