"""What a configuration means, and what is wrong with it; no torch."""
