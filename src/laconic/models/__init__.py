"""Models that nobody else ships. Importing this registers them with timm."""

from laconic.models import scenes as scenes
