"""FlashAttention and FlashMask as sft plugins."""
