"""The command line: one command a file, each a plain function that returns a report."""

from laconic.cli.app import main as main
