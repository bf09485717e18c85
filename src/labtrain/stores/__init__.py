"""Stores for checkpoints: folders and object stores. No torch."""
