"""Validation of data sets: every issue at once, in any format."""
