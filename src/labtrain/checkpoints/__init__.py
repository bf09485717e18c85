"""A checkpoint's files: how they are written, read, converted and found."""
