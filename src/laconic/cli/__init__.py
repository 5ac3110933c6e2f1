"""The command line: one command a file, each a plain function that returns a report."""
