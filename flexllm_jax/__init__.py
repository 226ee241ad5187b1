"""flexllm_jax: serve a language model and finetune its adapters on the same device."""
