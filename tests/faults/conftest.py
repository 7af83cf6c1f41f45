from pathlib import Path

import pytest
from runs import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def undisturbed(nursery: Nursery, tmp_path_factory) -> Path:
    """The directory of a run that nothing broke off. Not to be written to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, said = nursery.train(run)
    assert code == 0, said
    return run
