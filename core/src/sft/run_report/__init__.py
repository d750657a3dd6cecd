"""What is known of a run from its folder: while it trains, when it has ended, and of several runs side by side."""
