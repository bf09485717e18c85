"""The arithmetic that gives the same bits on any number of devices. Torch, and no Lightning."""
