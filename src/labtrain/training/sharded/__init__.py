"""One step of a global batch, cut into shards: the same bits on any number of devices."""
