"""Finds, undoes, saves and restores what a step or a training changes beside weights."""
