"""Necks: feature pyramids between backbone and head."""
