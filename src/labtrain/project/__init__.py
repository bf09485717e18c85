"""A new experiment, and the demonstration that four ways of training give one digest."""
