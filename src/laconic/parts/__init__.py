"""Steps that more than one method takes: score, rank, match, share out, cluster, predict.

All of it runs in float32 and outside autocast (see `laconic.compression`). Ties go to the lower index.
"""

from laconic.parts.clustering import density_peaks, squared_distances
from laconic.parts.matching import bipartite, cosine, greedy_pairs, lay, length, one_to_one, share, split
from laconic.parts.predictor import Predictor, gumbel_keep
from laconic.parts.scores import SCORES, Score, ScoreName, arbitrary, class_attention, mean_query_attention, shuffled

__all__ = [
    "SCORES",
    "Predictor",
    "Score",
    "ScoreName",
    "arbitrary",
    "bipartite",
    "class_attention",
    "cosine",
    "density_peaks",
    "greedy_pairs",
    "gumbel_keep",
    "lay",
    "length",
    "mean_query_attention",
    "one_to_one",
    "share",
    "shuffled",
    "split",
    "squared_distances",
]
