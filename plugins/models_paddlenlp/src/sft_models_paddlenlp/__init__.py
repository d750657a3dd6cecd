"""PaddleNLP's model classes for sft: families that its decoder does not have."""
