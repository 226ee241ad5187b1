"""Times the gated delta rule.

python -m kernels_pallas.gated_delta.bench [--case SUBSTRING] [--backend pallas|xla]
"""

from kernels_pallas.benchmark import main
from kernels_pallas.gated_delta.arg_specs import CASES

if __name__ == "__main__":
    main(CASES)
