"""What leaves the machine: model cards, and pushing to the hub."""
