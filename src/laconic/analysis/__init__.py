"""Analysis of reduced models: multiply-adds, time, memory, provenance of patches, accuracy, diagnosis."""
