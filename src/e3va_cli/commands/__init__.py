"""One file a command: reads the configuration, calls the rooms below, prints."""
