"""A digits model as a run leaves it after two epochs, on disk."""

import pytest

from vmamba.config import get_config
from vmamba.runtime.trainer import run


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    options = {
        "OUTPUT": str(output),
        "TRAIN.EPOCHS": 2,
        "TRAIN.WARMUP_EPOCHS": 1,
        "DATA.BATCH_SIZE": 256,
        "PRINT_FREQ": 2,
    }
    run(get_config("configs/vmamba_digits.yaml", [text for pair in options.items() for text in map(str, pair)]))
    return output / "vmamba_digits" / "default"
