"""Low-rank products of many adapters in one batch."""

from kernels_pallas.grouped_lora.api import ahead, grouped_lora, job_lora, low_rank_sums
from kernels_pallas.grouped_lora.sums import Ahead, LowRankSum

__all__ = ["Ahead", "LowRankSum", "ahead", "grouped_lora", "job_lora", "low_rank_sums"]
