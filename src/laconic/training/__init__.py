"""Training: our own short loop over accelerate, with timm's augmentation, optimisers and schedules."""
