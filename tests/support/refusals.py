"""What is refused, by the fields of the error and not by its words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlx_cpo_plugin.errors import UserError


@contextmanager
def refused(error: type[UserError] = UserError, match: str | None = None, **fields: str) -> Iterator[None]:
    """Assert that the block raises ``error``, in one sentence, with these of ``key``, ``place`` and ``allowed``."""
    with pytest.raises(error, match=match) as caught:
        yield
    found = {name: getattr(caught.value, name) for name in fields}
    assert found == fields, f"{found} in place of {fields}"
    assert "\n" not in str(caught.value)
