"""The folder of a run: its files, and the lock that keeps out a second writer."""
