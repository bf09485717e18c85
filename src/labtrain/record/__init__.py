"""What names a run, and what it leaves: configuration, sources, receipt, trail, digests. No torch."""
