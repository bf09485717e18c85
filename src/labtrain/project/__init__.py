"""Create a new experiment, and demonstrate that four ways of training give one digest."""
