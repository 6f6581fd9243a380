"""What was trained, as a thing to keep, pass on and use."""
