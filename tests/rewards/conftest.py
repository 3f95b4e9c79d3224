import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for sandboxes.py

from sandboxes import sandbox_of

from rewards.sandbox import LEVELS, Sandbox


@pytest.fixture(scope="module", params=reversed(LEVELS))
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Of each level."""
    with sandbox_of(request.param) as found:
        yield found


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def walled(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Of each level that keeps files apart; test_sandbox_levels.py shows what the other lets by."""
    with sandbox_of(request.param) as found:
        yield found


@pytest.fixture
def secret() -> Iterator[Path]:
    """A file outside that anyone may read and write."""
    path = Path(f"/var/tmp/posttrain-secret-{os.getpid()}")
    path.write_text("the hidden tests")
    path.chmod(0o666)
    yield path
    path.unlink()
