"""What a run survives, tried and counted: a short form in the slow tier, the whole by ``make test-reliability``."""
