import os

import pytest
import torch

if os.environ.get("LACONIC_CHECK_SHAPES"):  # before anything imports laconic
    from jaxtyping import install_import_hook

    install_import_hook("laconic", "beartype.beartype")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
