"""Operations that several methods share: score, rank, match, normalise weights, cluster, predict.

All of them run in float32 and outside autocast (see `laconic.core.token_reduction`). Ties go to the lower index.
"""

from laconic.methods.ops.alone import NoKeepRate
from laconic.methods.ops.checks import require, require_class_token
from laconic.methods.ops.clustering import density_peaks, precise, squared_distances
from laconic.methods.ops.everywhere import EveryBlock
from laconic.methods.ops.frames import FramesReducer, change, starts_of
from laconic.methods.ops.fuser import HIDDEN, Fused, learned_at, learning, mapping
from laconic.methods.ops.fusing import both_ways, fuse, soften
from laconic.methods.ops.grouped import BeforeBlocks, hide_groups, merge_groups, taken
from laconic.methods.ops.halting import depth_target, halting_divergence
from laconic.methods.ops.kmeans import lloyd, strided
from laconic.methods.ops.learned import start_small
from laconic.methods.ops.linkage import agglomerate
from laconic.methods.ops.matching import bipartite, cosine, group_normalize, length, one_to_one, scatter_back, topk_split
from laconic.methods.ops.medoids import cheapest, medoids_of, nearest_medoid, spread
from laconic.methods.ops.names import joined, last_copies, renamed
from laconic.methods.ops.nearest import best_of_rows, greedy_pairs, nearest
from laconic.methods.ops.neighbours import merge_neighbours
from laconic.methods.ops.options import remove_schedule
from laconic.methods.ops.pairing import Pairing, as_in_0_1, spread_out
from laconic.methods.ops.parity import by_parity, parity, soft_matching
from laconic.methods.ops.patterns import distances, evenly, ring, square, within
from laconic.methods.ops.pooling import by_place, cells, grid_of, runs, set_out
from laconic.methods.ops.predictor import Predictor, gumbel_keep
from laconic.methods.ops.quadtree import (
    Level,
    at_least_below,
    levels_of,
    merge_below,
    merge_cheapest,
    needed_depth,
    spread_costs,
)
from laconic.methods.ops.readout import CLASS_LOGITS, ClassHead
from laconic.methods.ops.scores import SCORES, Score, ScoreName, arbitrary, class_attention, mean_query_attention, shuffled
from laconic.methods.ops.selector import Selector
from laconic.methods.ops.slow_path import SlowPath
from laconic.methods.ops.soft import Mixer, Slots, by_stage, transport
from laconic.methods.ops.thresholds import above, absorb, highest_given, matches
from laconic.methods.ops.work import WORK, work_left, work_planned

__all__ = [
    "CLASS_LOGITS",
    "HIDDEN",
    "SCORES",
    "WORK",
    "BeforeBlocks",
    "ClassHead",
    "EveryBlock",
    "FramesReducer",
    "Fused",
    "Level",
    "Mixer",
    "NoKeepRate",
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
    "at_least_below",
    "best_of_rows",
    "bipartite",
    "both_ways",
    "by_parity",
    "by_place",
    "by_stage",
    "cells",
    "change",
    "cheapest",
    "class_attention",
    "cosine",
    "density_peaks",
    "depth_target",
    "distances",
    "evenly",
    "fuse",
    "greedy_pairs",
    "grid_of",
    "group_normalize",
    "gumbel_keep",
    "halting_divergence",
    "hide_groups",
    "highest_given",
    "joined",
    "last_copies",
    "learned_at",
    "learning",
    "length",
    "levels_of",
    "lloyd",
    "mapping",
    "matches",
    "mean_query_attention",
    "medoids_of",
    "merge_below",
    "merge_cheapest",
    "merge_groups",
    "merge_neighbours",
    "nearest",
    "nearest_medoid",
    "needed_depth",
    "one_to_one",
    "parity",
    "precise",
    "remove_schedule",
    "renamed",
    "require",
    "require_class_token",
    "ring",
    "runs",
    "scatter_back",
    "set_out",
    "shuffled",
    "soft_matching",
    "soften",
    "spread",
    "spread_costs",
    "spread_out",
    "square",
    "squared_distances",
    "start_small",
    "starts_of",
    "strided",
    "taken",
    "topk_split",
    "transport",
    "within",
    "work_left",
    "work_planned",
]
