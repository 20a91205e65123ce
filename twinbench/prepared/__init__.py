"""What a method may ask the run for: one file per argument, called as the argument is."""
