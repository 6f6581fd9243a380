"""Run folders: the files in them, and the lock that gives each one writer."""
