"""What several test files share: models, data and records made on the spot, and the commands that run on them."""
