"""Hold out a share of the training images of every class for validation, by seed."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from laconic.data.pictures import Chosen, ImageSet


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[Chosen, Chosen]:
    """Divide a set into images for training and images held out, the same ones for the same seed.

    Of every class with two images or more, ``share`` of the images is held out, rounded, at least one and never all.

    Raises:
        ValueError: ``share`` is not between 0 and 1, or no class has two images.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must be above 0 and below 1, not {share}")
    by_class = defaultdict[int, list[int]](list)
    for number, label in enumerate(images.labels_of_all()):
        by_class[label].append(number)
    # numpy guarantees that this stream never changes
    draws = np.random.PCG64(np.random.SeedSequence([seed, 1])).random_raw(len(images))
    out = set[int]()
    for numbers in by_class.values():
        if len(numbers) > 1:
            count = min(len(numbers) - 1, max(1, round(share * len(numbers))))
            out |= set(sorted(numbers, key=lambda number: (int(draws[number]), number))[:count])
    if not out:
        raise ValueError(f"no class has two images, so none can be held out of {len(images)}; add images, or a folder val")
    words = f"of {len(images):,} images; {len(out):,} are held out for validation: {share:.0%} of each class, seed {seed}"
    kept = [number for number in range(len(images)) if number not in out]
    training = Chosen(images, kept, f"{len(kept):,} {words}")
    return training, Chosen(images, sorted(out), f"{len(out):,} held out {words.partition(';')[0]}, which are not trained on")
