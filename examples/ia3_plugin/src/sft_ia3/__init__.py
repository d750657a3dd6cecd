"""(IA)³ as an sft plugin of a third party."""
