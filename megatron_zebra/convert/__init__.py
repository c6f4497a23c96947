"""Models of other programs, in and out: a table per family, applied one tensor at a time."""
