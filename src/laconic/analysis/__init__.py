"""What a reduced model costs and does: multiply-adds, time, where patches go, accuracy, diagnosis."""
