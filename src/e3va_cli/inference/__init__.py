"""Trained adapters at work: on one image or many, one adapter or several on one pass of the backbone."""
