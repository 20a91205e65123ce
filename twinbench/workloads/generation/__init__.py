"""Causal language models, scored by lm-eval."""
