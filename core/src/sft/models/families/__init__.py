"""Model families: how the `config.json` of each is read."""
