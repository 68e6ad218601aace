"""What a run left behind, read back: its record, curves and a page that shows both."""
