"""Datasets for finetuning: formats, loss masks, batches and packing."""
