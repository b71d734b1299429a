"""What every test needs: a cache of its own, so that none sees what another left behind."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Statistics and machine code go to a folder of this test, not to that of the user."""
    # Not below the test's own `tmp_path`, whose content it may look at.
    monkeypatch.setenv("MODELKIN_CACHE", str(tmp_path_factory.mktemp("cache")))
