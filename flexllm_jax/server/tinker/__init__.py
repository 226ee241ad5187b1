"""The Tinker API: models that clients train call by call, and samplers of them."""
