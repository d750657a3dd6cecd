"""sft's testing kit: a tiny model, data, small runs, as fixtures."""

pytest_plugins = ["sft.testing"]
