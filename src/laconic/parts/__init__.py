"""Steps that more than one method takes: score, rank, match, share out, cluster, predict.

All of it runs in float32 and outside autocast (see `laconic.compression`). Ties go to the lower index.
"""

from laconic.parts.alone import Alone
from laconic.parts.clustering import density_peaks, precise, squared_distances
from laconic.parts.kmeans import lloyd, strided
from laconic.parts.linkage import agglomerate
from laconic.parts.matching import bipartite, cosine, greedy_pairs, lay, length, one_to_one, share, split
from laconic.parts.medoids import cheapest, medoids_of, nearest_medoid, spread
from laconic.parts.parity import by_parity, soft_matching
from laconic.parts.patterns import distances, evenly, ring, square, within
from laconic.parts.pooling import by_place, cells, check_grid, runs, set_out
from laconic.parts.predictor import Predictor, gumbel_keep
from laconic.parts.scores import SCORES, Score, ScoreName, arbitrary, class_attention, mean_query_attention, shuffled
from laconic.parts.selector import Selector
from laconic.parts.soft import Mixer, Slots, by_stage, transport

__all__ = [
    "SCORES",
    "Alone",
    "Mixer",
    "Predictor",
    "Score",
    "ScoreName",
    "Selector",
    "Slots",
    "agglomerate",
    "arbitrary",
    "bipartite",
    "by_parity",
    "by_place",
    "by_stage",
    "cells",
    "cheapest",
    "check_grid",
    "class_attention",
    "cosine",
    "density_peaks",
    "distances",
    "evenly",
    "greedy_pairs",
    "gumbel_keep",
    "lay",
    "length",
    "lloyd",
    "mean_query_attention",
    "medoids_of",
    "nearest_medoid",
    "one_to_one",
    "precise",
    "ring",
    "runs",
    "set_out",
    "share",
    "shuffled",
    "soft_matching",
    "split",
    "spread",
    "square",
    "squared_distances",
    "strided",
    "transport",
    "within",
]
