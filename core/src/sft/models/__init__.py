"""Models: where they come from, their layers, their attention, how they are saved. Architectures are PaddleNLP's."""
