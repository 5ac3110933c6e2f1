"""Labelled images for training and evaluation: data sets by name, transforms per model, and a resumable order."""

from laconic.data.labelling import Labelling
from laconic.data.opening import find_data, open_images
from laconic.data.order import Order
from laconic.data.pictures import ImageSet, Part, decode
from laconic.data.prepared import Prepared, seeded
from laconic.data.report import Report, count_read
from laconic.data.sizes import Unreadable

__all__ = [
    "ImageSet",
    "Labelling",
    "Order",
    "Part",
    "Prepared",
    "Report",
    "Unreadable",
    "count_read",
    "decode",
    "find_data",
    "open_images",
    "seeded",
]
