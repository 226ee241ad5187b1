"""Picks the implementation of the grouped low-rank product. The XLA reference is the only one so
far."""

from kernels_pallas.grouped_lora.base import grouped_lora

__all__ = ["grouped_lora"]
