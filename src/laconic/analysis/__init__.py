"""Measure and evaluate models: timing, memory, the machine, accuracy and its intervals."""
