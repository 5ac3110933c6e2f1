"""Sparse weights of a vision transformer, grown and pruned while it trains: SViTE (single weights), S2ViTE (heads, neurons).

Chasing Sparsity in Vision Transformers: An End-to-End Exploration (Chen et al., NeurIPS 2021, arXiv:2106.04533). A manager of
masks over a plain model, beside the optimizer; it knows nothing of tokens and may go with any method that reduces them::

    sparsity = StructuredSparsity(model, until=total_steps, heads=0.7, neurons=0.7)
    loss.backward(); optimizer.step(); sparsity.step(); optimizer.zero_grad()
    ...
    sparsity.remove_()  # the masked heads and neurons really go: fewer parameters, fewer multiply-adds
"""

from laconic.training.sparsity.structured import StructuredSparsity
from laconic.training.sparsity.topology import Topology, erk
from laconic.training.sparsity.unstructured import UnstructuredSparsity

__all__ = ["StructuredSparsity", "Topology", "UnstructuredSparsity", "erk"]
