"""Where checkpoints lie: folders and object stores, and what is in them. No torch."""
