"""Decoder models in Flax and their Hugging Face weights."""
