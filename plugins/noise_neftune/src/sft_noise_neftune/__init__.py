"""NEFTune as an sft plugin."""
