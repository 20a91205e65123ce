"""Tensors on disk and in memory: read, checked, written."""
