"""What a step minimises, as sft plugins: other losses of a token, and preferences."""
