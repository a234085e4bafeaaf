import pytest

from tests.serving.live_server import warm_model


@pytest.fixture(scope="session")
def model():
    """A tiny model whose programs are compiled, for 4 rows."""
    return warm_model()
