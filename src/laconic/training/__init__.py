"""Training: a short loop on accelerate, with timm's augmentation, optimisers and learning-rate schedules."""
