"""A whole run of a train mode: from settings to a trained, tested and fused model."""
