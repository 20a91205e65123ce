"""What is written down: one JSON line per measured number."""
