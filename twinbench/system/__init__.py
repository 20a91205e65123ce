"""Processes, memory, files that appear whole, mistakes, and how a command ends."""
