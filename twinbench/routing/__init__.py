"""Who is asked, and one forward pass for samples of different routes."""
