"""Sparse weights of a vision transformer, pruned and grown in training: SViTE (single weights), S2ViTE (heads and neurons).

Chasing Sparsity in Vision Transformers: An End-to-End Exploration (Chen et al., NeurIPS 2021, arXiv:2106.04533). A manager
applies masks to the weights of a plain model after each optimizer step. It is independent of tokens, and can be combined with
any token reduction::

    sparsity = StructuredSparsity(model, until=total_steps, heads=0.7, neurons=0.7)
    loss.backward(); optimizer.step(); sparsity.step(); optimizer.zero_grad()
    ...
    sparsity.remove_()  # remove the masked heads and neurons: fewer parameters, fewer multiply-adds
"""

from laconic.training.sparsity.structured import StructuredSparsity
from laconic.training.sparsity.topology import Topology, erk
from laconic.training.sparsity.unstructured import UnstructuredSparsity

__all__ = ["StructuredSparsity", "Topology", "UnstructuredSparsity", "erk"]
