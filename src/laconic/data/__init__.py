"""Images to train and to evaluate on: sets of them by name, prepared for a model, in an order that can be resumed."""

from laconic.data.opening import find_data, open_images
from laconic.data.order import Order
from laconic.data.pictures import ImageSet, Part, decode
from laconic.data.prepared import Prepared, seeded
from laconic.data.report import Report, count_read
from laconic.data.sizes import Unreadable

__all__ = [
    "ImageSet",
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
