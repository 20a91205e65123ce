"""Merged models as folders for other people's tools."""
