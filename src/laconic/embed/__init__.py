"""Vectors of a collection of pictures: on one machine, or under Ray Data, ``datasets`` or Daft."""

from laconic.embed.embedder import Embedder as Embedder
from laconic.embed.features import KINDS as KINDS
from laconic.embed.vectors import read_vectors as read_vectors
