"""For plugin authors: what a plugin declares, whether that holds, and a new one to begin with."""
