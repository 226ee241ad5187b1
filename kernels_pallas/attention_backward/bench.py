"""Times the attention backward on the device at hand.

python -m kernels_pallas.attention_backward.bench [--case SUBSTRING] [--backend pallas|xla]
"""

from kernels_pallas.attention_backward.arg_specs import CASES
from kernels_pallas.benchmark import main

if __name__ == "__main__":
    main(CASES)
