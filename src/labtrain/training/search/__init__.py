"""Searches by Lightning's Tuner, which train for some steps and keep nothing."""
