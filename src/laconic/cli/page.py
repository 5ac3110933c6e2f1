"""The report of any command as a page: its paragraphs, tables and charts, and the JSON that ``--json`` prints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from laconic.cli.output import Report, Table, Verbatim
from laconic.cli.outputs import reported
from laconic.core.files import check_output_file, write_atomically
from laconic.core.optional_deps import need
from laconic.report.chart import Chart
from laconic.report.page import Code, Grid, Part, Section, build


def check(file: Path) -> None:
    """Refuse a page that could not be written after the work.

    Raises:
        Refusal: the file cannot be written. ImportError: a library of the extra ``report`` is missing.
    """
    check_output_file(file, "--html")
    for library in ("jinja2", "vl_convert"):
        need(library, "report")


def write(file: Path, report: Report, command: str) -> None:
    """Write the page of a report, and the command under it.

    Raises:
        Refusal: the file cannot be written.
    """
    with reported(report):
        write_atomically(file, page(report, command))


def page(report: Report, command: str) -> str:
    """Return the page of a report as HTML; every table begins a section."""
    name = command.split()[1] if len(command.split()) > 1 else "report"
    parts = list(report.parts())
    lead = list(itertools.takewhile(lambda part: isinstance(part, str) and not isinstance(part, Verbatim), parts))
    sections, title = list[Section](), f"laconic {name}"
    for part in parts[len(lead) :]:
        if isinstance(part, Table) or not sections:
            sections.append(Section(part.title if isinstance(part, Table) and part.title else "Result", []))
        sections[-1] = Section(sections[-1].title, [*sections[-1].parts, _part(part)])
    return build(title, [text.strip() for text in lead if isinstance(text, str)], sections, report.to_json(), command)


def _part(part: Any) -> Part:
    if isinstance(part, Table):
        return Grid("", part.header, part.rows, part.words)
    if isinstance(part, Verbatim):
        return Code(str(part))
    assert isinstance(part, str | Chart)
    return part.strip() if isinstance(part, str) else part
