"""Steps that more than one method takes: score, rank, match, share out, cluster, predict.

All of it runs in float32 and outside autocast (see `laconic.compression`). Ties go to the lower index.
"""

from laconic.parts.alone import Alone
from laconic.parts.checks import demand, demand_class_token
from laconic.parts.clustering import density_peaks, precise, squared_distances
from laconic.parts.everywhere import Everywhere
from laconic.parts.fuser import HIDDEN, Fused, learned_at, learning, mapping
from laconic.parts.fusing import both_ways, fuse, soften
from laconic.parts.halting import depth_target, halting_divergence
from laconic.parts.kmeans import lloyd, strided
from laconic.parts.learned import start_small
from laconic.parts.linkage import agglomerate
from laconic.parts.matching import bipartite, cosine, lay, length, one_to_one, share, split
from laconic.parts.medoids import cheapest, medoids_of, nearest_medoid, spread
from laconic.parts.names import joined, last_copies, renamed
from laconic.parts.nearest import best_of_rows, greedy_pairs, nearest
from laconic.parts.options import taking_away
from laconic.parts.pairing import Pairing, as_in_0_1, spread_out
from laconic.parts.parity import by_parity, parity, soft_matching
from laconic.parts.patterns import distances, evenly, ring, square, within
from laconic.parts.pooling import by_place, cells, grid_of, runs, set_out
from laconic.parts.predictor import Predictor, gumbel_keep
from laconic.parts.readout import CLASS_LOGITS, ClassHead
from laconic.parts.scores import SCORES, Score, ScoreName, arbitrary, class_attention, mean_query_attention, shuffled
from laconic.parts.selector import Selector
from laconic.parts.slow_path import SlowPath
from laconic.parts.soft import Mixer, Slots, by_stage, transport
from laconic.parts.thresholds import above, absorb, highest_given, matches
from laconic.parts.work import WORK, work_left, work_planned

__all__ = [
    "CLASS_LOGITS",
    "HIDDEN",
    "SCORES",
    "WORK",
    "Alone",
    "ClassHead",
    "Everywhere",
    "Fused",
    "Mixer",
    "Pairing",
    "Predictor",
    "Score",
    "ScoreName",
    "Selector",
    "Slots",
    "SlowPath",
    "above",
    "absorb",
    "agglomerate",
    "arbitrary",
    "as_in_0_1",
    "best_of_rows",
    "bipartite",
    "both_ways",
    "by_parity",
    "by_place",
    "by_stage",
    "cells",
    "cheapest",
    "class_attention",
    "cosine",
    "demand",
    "demand_class_token",
    "density_peaks",
    "depth_target",
    "distances",
    "evenly",
    "fuse",
    "greedy_pairs",
    "grid_of",
    "gumbel_keep",
    "halting_divergence",
    "highest_given",
    "joined",
    "last_copies",
    "lay",
    "learned_at",
    "learning",
    "length",
    "lloyd",
    "mapping",
    "matches",
    "mean_query_attention",
    "medoids_of",
    "nearest",
    "nearest_medoid",
    "one_to_one",
    "parity",
    "precise",
    "renamed",
    "ring",
    "runs",
    "set_out",
    "share",
    "shuffled",
    "soft_matching",
    "soften",
    "split",
    "spread",
    "spread_out",
    "square",
    "squared_distances",
    "start_small",
    "strided",
    "taking_away",
    "transport",
    "within",
    "work_left",
    "work_planned",
]
