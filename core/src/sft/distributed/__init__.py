"""Which parts of a model one process holds, where several share it."""
