"""Times the window attention backward on the device at hand.

python -m kernels_pallas.window_attention_backward.bench [--case SUBSTRING] [--backend pallas|xla]
"""

from kernels_pallas.benchmark import main
from kernels_pallas.window_attention_backward.arg_specs import CASES

if __name__ == "__main__":
    main(CASES)
