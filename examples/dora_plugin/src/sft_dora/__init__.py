"""DoRA as an sft plugin of a third party."""
