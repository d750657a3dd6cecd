"""Options that several commands share. ``lora_path`` is PaddleNLP's name for an adapter folder of any type."""

MODEL = ("--model_name_or_path", "--model-name-or-path", "model")
PLUGIN = ("--plugin", "plugins")
ADAPTER = ("--adapter_path", "--adapter-path", "--lora_path", "--lora-path", "adapter")
