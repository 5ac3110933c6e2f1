"""Scripts that measure, compare with others and write the pages in docs/. Run them from the repository; not in the wheel."""
