import os

import pytest
import torch

if os.environ.get("LACONIC_CHECK_SHAPES"):  # before anything imports laconic
    from jaxtyping import install_import_hook

    install_import_hook("laconic", "beartype.beartype")


if os.environ.get("PYTEST_XDIST_WORKER"):  # one thread a worker, or they stand in each other's way
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
