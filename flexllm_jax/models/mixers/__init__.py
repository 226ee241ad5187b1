"""Mixers: what makes a token's vector from those of the tokens before it; each layer has one.

The decoder's layer is the same for all of them: a norm, projections, the mixing itself, which is
the step's or the backward's as it reads what they keep, an output projection. What differs is here.
"""

from flexllm_jax.models.mixers.attention import AttentionMixer
from flexllm_jax.models.mixers.gated_delta import GatedDeltaMixer
from flexllm_jax.models.mixers.mixer import Mixer, Tap
from flexllm_jax.models.spec import AttentionSpec, GatedDeltaSpec, MixerSpec

__all__ = ["Mixer", "Tap", "mixer_of"]

_MIXERS: dict[type, Mixer] = {AttentionSpec: AttentionMixer(), GatedDeltaSpec: GatedDeltaMixer()}


def mixer_of(spec: MixerSpec) -> Mixer:
    """What belongs to a layer with this mixer."""
    return _MIXERS[type(spec)]
