"""Saved reduced models, the Hugging Face Hub, and the weights that authors publish."""

from laconic.checkpoints.save_load import load as load
from laconic.checkpoints.save_load import save as save
