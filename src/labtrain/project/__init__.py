"""Create a new experiment and its editor's schemas, and demonstrate that four ways of training give one digest."""
