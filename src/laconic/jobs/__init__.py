"""The jobs behind the command line, one verb a file: each a plain function that returns a report."""
