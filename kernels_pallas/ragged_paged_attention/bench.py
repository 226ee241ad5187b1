"""Time this kernel's cases: `python -m kernels_pallas.ragged_paged_attention.bench`."""

from kernels_pallas.benchmark import main
from kernels_pallas.ragged_paged_attention.arg_specs import CASES

if __name__ == "__main__":
    main(CASES)
