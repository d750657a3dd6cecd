"""Models: where they come from, their layers, their attention, how they are saved. One decoder computes them."""
