"""VeRA as an sft plugin."""
