"""The Train tab: a local page to write a configuration, check its data, train, watch, compare and report."""
