"""Folders of weights: which of them nobody needs."""

import asyncio
from pathlib import Path

from flexllm_jax.config import build_config
from flexllm_jax.server.database import Database
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.tinker.journal import Journal
from flexllm_jax.server.tinker.store import Store
from tests.server.tinker.conftest import tinker_config


def test_what_is_being_written_is_not_removed(chat_llama, tmp_path):
    """Nor is its half-written form, under whatever suffix, though no row names it yet."""
    config = build_config(tinker_config(chat_llama, tmp_path))
    database = Database(f"sqlite:///{tmp_path / 'kept.sqlite'}")
    store = Store(config, Journal(database), ModelRegistry(config), several=False)
    writing = Path(store.new_folder())
    left = [store.folder / name for name in ("killed", "killed.part", "killed.old")]
    kept = [writing.with_suffix(suffix) for suffix in ("", ".part", ".old")]
    for folder in (*left, *kept):
        folder.mkdir()
    assert asyncio.run(store.sweep(60.0)) == sorted(str(folder) for folder in left)
    assert sorted(store.folder.iterdir()) == sorted(kept)
    database.close()
