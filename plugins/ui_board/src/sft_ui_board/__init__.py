"""The live view of runs as an sft plugin."""
