"""Turn a command line into a named job in its own process."""
