"""Trains one run. The only package that imports Lightning."""
