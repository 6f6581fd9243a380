"""Small parts without a subject of their own: files, text, terminal, environment, mixed precision."""
