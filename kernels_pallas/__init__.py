"""Attention and adapter operators, one folder each."""
