"""How long a step takes: a model of it, fitted or from a chip's data sheet."""
