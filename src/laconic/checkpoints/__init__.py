"""Save and load reduced models, on disk and on the Hugging Face Hub, and import the weights that paper authors publish."""

from laconic.checkpoints.save_load import load as load
from laconic.checkpoints.save_load import save as save
