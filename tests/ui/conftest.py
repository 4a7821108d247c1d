import pytest


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch):
    """The page makes a key in the home folder."""
    monkeypatch.setenv("HOME", str(home))
