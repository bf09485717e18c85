"""The runs of an experiment: list them, load a model, keep a note, remove one."""
