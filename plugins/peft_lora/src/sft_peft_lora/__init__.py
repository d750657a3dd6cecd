"""LoRA and its refinements as sft plugins, one module a technique."""
