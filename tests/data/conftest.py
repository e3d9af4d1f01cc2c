import pytest

from mtrain.data import tables


@pytest.fixture
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr(tables, "sleep", waited.append)
    return waited
