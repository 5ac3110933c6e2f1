"""Label files: a table with the name of an image and its class in each row, as of Kaggle and of Tiny-ImageNet's val split."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from laconic.data.layout import Found, is_hidden, is_image, natural, some, walk
from laconic.data.model_record import one_form

ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet: image, class and four numbers in each line
LABEL = ("label", "class", "class_name", "category", "target", "breed", "species", "diagnosis")  # titles of columns


def label_file_of(folder: Path, given: str, split: str) -> Path | None:
    """Return the label file of a split: the one given ("{split}" stands for its name), or Tiny-ImageNet's own.

    Raises:
        FileNotFoundError: the file that was given does not exist.
    """
    if given:
        path = Path(given.replace("{split}", split))
        if not path.is_file():
            raise FileNotFoundError(f"--label-file {path}: there is no such file; give a table of image names and classes")
        return path
    return folder / ANNOTATIONS if (folder / ANNOTATIONS).is_file() else None


def find_labelled(folder: Path, table: Path) -> Found:
    """Find the images below a folder that a label file names, by path, file name, or file name without ending.

    Raises:
        ValueError: the file cannot be read as a table of images and classes, it names an image twice with two classes, or
            several files have a name in it.
    """
    paths, others, skipped, linked = list[str](), list[str](), list[str](), set[str]()
    for parts, _, names in walk(folder, skipped, linked):
        for name in names:
            hidden = any(map(is_hidden, parts)) or not is_image(name)
            (others if hidden else paths).append(os.path.join(*parts, name))
    rows = _rows(table)
    column, start = _label_column(rows[0], table), 0 if _is_of(rows[0][0], paths) else 1
    wanted = _labels(rows[start:], column, table)
    files, used = list[tuple[str, str]](), set[str]()
    for path in paths:
        key = next((key for key in _keys(path) if key in wanted), None)
        if key is None:
            others.append(path)
            continue
        if key in used:
            raise ValueError(
                f"--label-file {table} names {key}, and several files in {folder} have that name; give their paths"
            )
        used.add(key)
        files.append((path, wanted[key]))
    notes = [f"the classes come from {table}"]
    missing = [name for name in wanted if name not in used]
    if missing:
        notes.append(f"{len(missing):,} images in {table} have no file in {folder}: {some(missing)}")
    files.sort(key=lambda item: natural(item[0]))
    others = [path for path in others if Path(folder, path) != table]
    classes = sorted(set(wanted.values()), key=natural)
    return Found(tuple(files), tuple(classes), tuple(sorted(others, key=natural)), tuple(notes), frozenset(linked))


def _rows(table: Path) -> list[list[str]]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, delimiter="\t" if "\t" in first else ",")]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--label-file {table} cannot be read as a table: {error}; expected a .csv file in UTF-8") from error
    rows = [row for row in rows if any(row)]
    if not rows or min(map(len, rows)) < 2:
        raise ValueError(f"--label-file {table}: expected rows of an image name and a class, with commas or tabs between them")
    return rows


def _label_column(header: list[str], table: Path) -> int:
    titles = [title.lower() for title in header]
    named = next((titles.index(title) for title in LABEL if title in titles[1:]), None)
    if named is not None:
        return named
    if len(header) == 2 or table.name == ANNOTATIONS:
        return 1
    raise ValueError(
        f"--label-file {table} has the columns {', '.join(header)}; expected the image names in the first and a column called "
        f"{', '.join(LABEL[:3])} ..., or two columns"
    )


def _labels(rows: list[list[str]], column: int, table: Path) -> dict[str, str]:
    out = dict[str, str]()
    for row in rows:
        name, label = one_form(row[0]), one_form(row[column]) if column < len(row) else ""
        if not label or out.setdefault(name, label) != label:
            what = f"the classes {out[name]} and {label}" if label else "no class"
            raise ValueError(f"--label-file {table} gives {name} {what}; every image must have one class")
    return out


def _keys(path: str) -> tuple[str, ...]:
    """Return the names by which a table may call an image."""
    whole, name = one_form(path).replace(os.sep, "/"), one_form(os.path.basename(path))
    return whole, os.path.splitext(whole)[0], name, os.path.splitext(name)[0]


def _is_of(name: str, paths: list[str]) -> bool:
    return any(one_form(name) in _keys(path) for path in paths)
