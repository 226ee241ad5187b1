"""Adapters from and to PEFT's files."""
