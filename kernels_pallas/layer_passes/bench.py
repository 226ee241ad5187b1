"""Times a layer's passes.

python -m kernels_pallas.layer_passes.bench [--case SUBSTRING] [--backend pallas|xla]
"""

from kernels_pallas.benchmark import main
from kernels_pallas.layer_passes.arg_specs import CASES

if __name__ == "__main__":
    main(CASES)
