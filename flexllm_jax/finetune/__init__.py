"""Token-level finetuning jobs."""
