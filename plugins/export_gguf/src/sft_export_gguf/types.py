"""The types of numbers that are written; those with a q are blocks of 32 values with a scale."""

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
