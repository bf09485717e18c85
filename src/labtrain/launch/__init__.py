"""From a command line to a named job in a process of its own."""
