"""`sft certify`: what a plugin must keep, beside all others, tried on tiny models."""
