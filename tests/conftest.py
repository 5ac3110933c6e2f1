import os

import pytest
import torch

if os.environ.get("LACONIC_CHECK_SHAPES"):  # before anything imports laconic
    import shape_checks

    shape_checks.switch_on()


torch.set_num_threads(1)  # the models are so small that threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_pretrained_weights(monkeypatch):
    """As on a machine without a cache and without a hub."""
    from laconic.cli import weights

    monkeypatch.setattr(weights, "_cached", lambda cfg: None)
    monkeypatch.setattr(weights, "_hub_answers", lambda: False)
