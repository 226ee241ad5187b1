"""Low-rank products of many adapters in one batch."""

from kernels_pallas.grouped_lora.api import grouped_lora, job_lora

__all__ = ["grouped_lora", "job_lora"]
