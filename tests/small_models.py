"""Models without checkpoints, for tests that need no more than their shapes: all layers alike, of
Llama's kind."""

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.rope import RopeSpec
from flexllm_jax.models.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, NormSpec


def small_model(
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    d_ff: int,
    qk_norm: bool = False,
    tie_embeddings: bool = False,
    max_position_embeddings: int = 256,
) -> ModelConfig:
    """A model of these sizes."""
    attention = AttentionSpec(
        num_heads, num_kv_heads, head_dim, RopeSpec(1e4), qk_norm="head" if qk_norm else None
    )
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        d_model=d_model,
        layers=(LayerSpec(attention, MlpSpec(d_ff), NormSpec(1e-5)),) * num_layers,
        head=HeadSpec(tie_embeddings),
        max_position_embeddings=max_position_embeddings,
        eos_token_ids=(2,),
        bos_token_id=1,
    )
