"""Early stopping as an sft plugin."""
