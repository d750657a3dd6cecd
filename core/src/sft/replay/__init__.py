"""Steps of a run computed again: by its own loop, from the nearest checkpoint, with nothing written to its folder."""
