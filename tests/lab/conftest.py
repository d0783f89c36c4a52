import pytest
from lab_configs import digits

from fewstep.lab.config import Config


@pytest.fixture(scope="session")
def debug_config() -> Config:
    """experiments/digits with preset=debug; not to be changed in place (see `lab_configs.altered`)."""
    return digits()
