"""Deprecated: import from `laconic.analysis.evaluate`."""

from laconic.analysis.evaluate import ALONE, Accuracy, Answers, Processes, answers, evaluate, make_loader, transform_for

__all__ = ["ALONE", "Accuracy", "Answers", "Processes", "answers", "evaluate", "make_loader", "transform_for"]
