"""Data sets of the hub as an sft plugin."""
