"""Requests for text: chat, completions, tokenization, and the adapters they name."""
