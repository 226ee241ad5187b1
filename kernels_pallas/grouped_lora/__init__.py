"""Low-rank products of many adapters in one batch."""

from kernels_pallas.grouped_lora.api import grouped_lora, job_lora, low_rank_sums
from kernels_pallas.grouped_lora.sums import LowRankSum

__all__ = ["LowRankSum", "grouped_lora", "job_lora", "low_rank_sums"]
