"""Scripts that measure, compare and write the pages in docs/. Run them from the top of the repository; not in the wheel."""
