"""Writes, reads, converts and finds a checkpoint's files."""
