"""Inference and evaluation with trained adapters, of which several can share one forward pass of the backbone."""
