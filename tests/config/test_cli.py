"""What scripts share: an extra that is missing is told in one line."""

import pytest

from flexllm_jax.config.cli import needs_extra
from flexllm_jax.errors import UserError


def test_a_missing_extra_is_named() -> None:
    message = r"^no_such_library is not installed: pip install 'flexllm_jax\[load\]'$"
    with pytest.raises(UserError, match=message), needs_extra("load"):
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401
