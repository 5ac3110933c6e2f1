import shutil

import pytest
import torch

import laconic
from families import images, make

mixin = pytest.importorskip("laconic.checkpoints.hub_mixin")


def test_round_trip_through_the_mixin(tmp_path, monkeypatch):
    model, x = laconic.reduce_(make("plain"), "dtps", keep=0.5, at=[1, 2]), images("plain")
    wrapped = mixin.HubModel(model)
    wrapped.save_pretrained(tmp_path / "here")
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(mixin.HubModel.from_pretrained(tmp_path / "here")(x), expected)
        # a repository: what the hub would download
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(mixin, "snapshot_download", lambda repo, **_: shutil.copytree("here", repo.replace("/", "-")))
        again = mixin.HubModel._from_pretrained(model_id="me/mine")
        assert torch.equal(again(x), expected)
    assert again.model.laconic.config == laconic.DTPS()
