"""Data of the tasks: each module turns fetched files into training and test frames."""
