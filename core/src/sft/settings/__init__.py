"""Settings: what a run can be told, and from where."""
