"""A run's name and its records: configuration, sources, receipt, trail, digests. No torch."""
