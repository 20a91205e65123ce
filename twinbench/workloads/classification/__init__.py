"""Encoders with a head per task."""
