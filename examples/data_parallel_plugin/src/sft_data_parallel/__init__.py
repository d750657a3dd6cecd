"""An example of a parallel strategy."""
