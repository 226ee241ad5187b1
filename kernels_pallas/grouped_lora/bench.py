"""Times grouped LoRA, and beside each decode step the base projection that it adds to.

A call timed here also maps its tokens to blocks, which a step does once for all of its calls: the
cases named block-map tell how much that is.

python -m kernels_pallas.grouped_lora.bench [--case SUBSTRING] [--backend pallas|xla]
"""

from kernels_pallas.benchmark import main
from kernels_pallas.grouped_lora.arg_specs import CASES, adds_to_a_product, base_projection

if __name__ == "__main__":
    bases = tuple(
        base_projection(case) for case in CASES if "decode" in case.name and adds_to_a_product(case)
    )
    main(sorted((*CASES, *bases), key=lambda case: case.name))
