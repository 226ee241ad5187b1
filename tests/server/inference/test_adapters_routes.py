"""Which folders of adapters a client may name."""

import pytest

from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.adapters_routes import find_folder


def test_links_do_not_lead_outside(tmp_path):
    allowed = tmp_path / "allowed"
    for folder in (allowed / "good", tmp_path / "secret"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (allowed / "link").symlink_to(tmp_path / "secret")
    (allowed / "loop").symlink_to(allowed / "pool")
    (allowed / "pool").symlink_to(allowed / "loop")
    (allowed / "inside").mkdir()
    (allowed / "inside" / "adapter_config.json").symlink_to(allowed / "loop")
    assert find_folder("good", (allowed,)) == allowed / "good"
    for name in ("link", "loop", "loop/a", "../secret", "/etc", "a\0b", "absent"):
        with pytest.raises(ApiError) as error:
            find_folder(name, (allowed,))
        assert error.value.status in (403, 404)
    with pytest.raises(ApiError):
        find_folder("inside", (allowed,))
