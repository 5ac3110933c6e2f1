"""WebDataset shards: tars with a label (KEY.cls or KEY.json) next to every image KEY.jpg.

The rules of names and of labels are those of the webdataset package (the extra ``webdataset``). The images are read by their
positions in the tars, not as a stream, so that a run can be resumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.core import limits
from laconic.core.optional_deps import need
from laconic.core.values import shown
from laconic.data.model_record import one_form

if TYPE_CHECKING:
    from laconic.data.tar import Member

LABELS = ("cls", "json")  # endings, in the order in which they are looked for
ENTRIES = ("cls", "label", "class", "class_id", "label_id", "class_name", "label_name")  # of a .json, in that order
LARGEST = 2**20  # bytes of a label
CLASSES = 10**6  # the largest class number


def key_of(path: str) -> tuple[str, str]:
    """Return the key of a sample and the ending of its file, as WebDataset divides them: at the first dot of the name."""
    folder, slash, name = path.rpartition("/")
    key, _, ending = name.partition(".")
    return f"{folder}{slash}{key}", ending


def labels_of_samples(members: Iterable[Member]) -> dict[tuple[Path, str], Member]:
    """Return the label files in tars, by tar and key of the sample."""
    out = dict[tuple[Path, str], "Member"]()
    for member in members:
        key, ending = key_of(member.path)
        place = member.tar, key
        if member.size >= 0 and ending in LABELS and (place not in out or ending == LABELS[0]):
            out[place] = member
    return out


def read_labels(members: Sequence[Member]) -> list[int | str]:
    """Read the class of every label file.

    Raises:
        ImportError: webdataset is not installed.
        ValueError: a label is neither a number from 0 nor a name, or some are numbers and some are names.
    """
    decode = need("webdataset.autodecode", "webdataset").basichandlers
    out, opened, file = list[int | str](), None, None
    try:
        for member in members:
            if opened != member.tar:
                if file is not None:
                    file.close()
                opened, file = member.tar, open(member.tar, "rb")  # noqa: SIM115 (closed below)
            limits.check(f"{member.tar}: {member.path} has", member.size, LARGEST, "bytes")
            assert file is not None
            file.seek(member.start)
            out.append(_label(decode, member, file.read(member.size)))
    finally:
        if file is not None:
            file.close()
    if len({type(label) for label in out}) > 1:
        names, numbers = (next(label for label in out if isinstance(label, kind)) for kind in (str, int))
        raise ValueError(f"{members[0].tar}: some labels are names ({names!r}) and some are numbers ({numbers}); use one kind")
    return out


def _label(decode: Any, member: Member, data: bytes) -> int | str:
    ending = key_of(member.path)[1]
    try:
        value = decode(ending, data)
    except ValueError:
        value = data.decode("utf-8", "replace").strip() if ending == "cls" else None
    if isinstance(value, Mapping):
        entry = next((name for name in ENTRIES if name in value), None)
        if entry is None:
            raise ValueError(
                f"{member.tar}: {member.path} has no label: expected one of {', '.join(ENTRIES)}, found {', '.join(value)}"
            )
        value = value[entry]
    if isinstance(value, str) and value.strip():
        return int(value) if value.strip().isdecimal() else one_form(value.strip())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= CLASSES:
        return value
    raise ValueError(f"{member.tar}: {member.path} has the label {shown(value)}; expected a class number from 0, or a name")


def are_shards(names: Sequence[str]) -> bool:
    """Return True if the names of tars are one name with consecutive numbers, as of shards, and not names of classes."""
    found = [re.fullmatch(r"(.*?)(\d{4,})", name) for name in names]
    parts = [(match[1], int(match[2])) for match in found if match]
    numbers = sorted(number for _, number in parts)
    one = len(parts) == len(names) > 1 and len({prefix for prefix, _ in parts}) == 1
    return one and numbers == [*range(numbers[0], numbers[0] + len(numbers))]
