import pytest
from fewstep.lab.config import Config
from lab_configs import digits


@pytest.fixture(scope="session")
def debug_config() -> Config:
    """experiments/digits with preset=debug; not to be changed in place (see `lab_configs.altered`)."""
    return digits()
