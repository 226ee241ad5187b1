"""How a request's tokens are chosen: parameters, masks of structures, cutoffs, the sampler."""
