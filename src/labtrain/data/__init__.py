"""The loader: samples that are a function of seed, epoch and index."""
