"""What `validate` found as one web page: tables, bars, a few records, copies side by side."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_jax.data.duplicates import Group, Leak, names
from llava_jax.data.fingerprints import PictureSet
from llava_jax.data.media import ImageError, load_image
from llava_jax.data.validate import Report
from llava_jax.data.video import Video
from llava_jax.data.web_page import embedded, write_page
from llava_jax.errors import RecordError

_MESSAGES = 20  # shown of each kind of fault or note
_RECORDS = 12  # shown of a data set
_GROUPS, _LEAKS = 20, 50
_IN_GROUP = 6  # pictures shown of a group
_SIDE = 160  # of a thumbnail in pixels
_TURN = 2000  # characters shown of a turn

_STYLE = """
section { margin-bottom: 2em; } figure { margin: 0; max-width: 12em; overflow-wrap: anywhere; }
figcaption { color: #555; font-size: 13px; } td { padding: 0 1em 0 0; vertical-align: top; }
td.bar { width: 24em; } td.bar div { background: #4a7db5; height: .9em; min-width: 1px; }
td.count { text-align: right; } article { flex-wrap: wrap; } dl { max-width: 50em; }
"""


class Shared(NamedTuple):
    """Another data set or benchmark, and which of its pictures are in ours."""

    ours: PictureSet
    theirs: PictureSet
    leaks: list[Leak]


def write_report_page(path: Path, reports: Sequence[Report], shared: Sequence[Shared]) -> None:
    """Writes the page. It reads the few pictures that it shows anew."""
    sections = [*map(_data_set, reports), *map(_leaks, shared)]
    write_page(path, f"Data: {reports[0].records.path}", "\n".join(sections), _STYLE)


def _data_set(report: Report) -> str:
    parts = [
        f"<h2>{escape(report.records.path)}</h2><p>{report.records_total:,} records, "
        f"{report.images_total:,} image files</p>"
    ]
    for title, table in (("faults", report.faults), ("notes", report.notes)):
        parts.append(f"<h3>{title if table else f'no {title}'}</h3>")
        for kind, messages in sorted(table.items(), key=lambda entry: -len(entry[1])):
            parts.append(_details(f"{len(messages):,} {kind}", messages[:], len(messages)))
    for one in report.distributions():
        parts.append(f"<h3>{escape(one.summary())}</h3>{_bars(one.bins())}")
    if scripts := report.texts.scripts():
        rows = [(name, share, f"{share:.1%}, {users:,} records") for name, share, users in scripts]
        parts.append(f"<h3>writing systems of the letters</h3>{_table(rows)}")
    if common := report.texts.common(report.records):
        rows = [(a.text[:_TURN], a.share, f"{a.share:.1%}, {a.count:,} times") for a in common]
        parts.append(f"<h3>most common answers</h3>{_table(rows)}")
    copies = "pictures that are the same" if report.groups else "no picture is like another"
    parts.append(f"<h3>{copies}</h3>" if len(report.fingerprints) else "")
    parts += [_group(group, report.pictures) for group in report.groups[:_GROUPS]]
    if len(report.groups) > _GROUPS:
        parts.append(f"<p>and {len(report.groups) - _GROUPS:,} groups more</p>")
    parts.append(f"<h3>records</h3>{''.join(_records(report))}")
    return f"<section>{''.join(parts)}</section>"


def _group(group: Group, pictures: PictureSet) -> str:
    users = pictures.fingerprints.users(group.rows)
    figures = "".join(_figure(pictures, row) for row in group.rows[:_IN_GROUP].tolist())
    title = f"{len(group.rows)} pictures, {group.kind}"
    return f"<article>{figures}{_details(title, [_numbers(users)])}</article>"


def _leaks(shared: Shared) -> str:
    ours, theirs, leaks = shared
    head = f"{theirs.records.path} in {ours.records.path}"
    count = f"{len(leaks):,} of {len(theirs.fingerprints):,} pictures"
    parts = [f"<h2>{escape(head)}</h2><p>{count}</p>"]
    if leaks:
        rows = np.unique(np.concatenate([leak.ours for leak in leaks]))
        users = _numbers(ours.fingerprints.users(rows))
        parts.append(_details(f"records of {ours.records.path} with one of them", [users]))
    if theirs.unreadable:
        title = f"{len(theirs.unreadable):,} records of {theirs.records.path} could not be read"
        parts.append(_details(title, theirs.unreadable[:_MESSAGES], len(theirs.unreadable)))
    for leak in leaks[:_LEAKS]:
        here = "".join(_figure(ours, row) for row in leak.ours[:_IN_GROUP].tolist())
        there = _figure(theirs, leak.theirs)
        parts.append(f"<article><div>{leak.kind}</div>{there}<div>is</div>{here}</article>")
    if len(leaks) > _LEAKS:
        parts.append(f"<p>and {len(leaks) - _LEAKS:,} pictures more</p>")
    return f"<section>{''.join(parts)}</section>"


def _records(report: Report) -> Iterable[str]:
    """Some of the records without faults, evenly spread."""
    sound = np.setdiff1d(np.arange(report.records_total), list(report.faulty))
    picked = np.unique(np.linspace(0, len(sound) - 1, _RECORDS).astype(int)) if len(sound) else ()
    for index in sound[picked].tolist():
        record = report.records[index]
        pictures = "".join(map(_picture, record.images, record.image_names))
        turns = [("system", record.system)] if record.system else []
        turns += [(turn.role, turn.text) for turn in record.turns]
        turns += [("rejected", record.rejected)] if record.rejected is not None else []
        rows = "".join(f"<dt>{role}</dt><dd>{escape(_cut(text))}</dd>" for role, text in turns)
        name = f"<dt>{escape(record.name)}</dt><dd></dd>"
        yield f"<article>{pictures}<dl>{name}{rows}</dl></article>"


def _figure(pictures: PictureSet, row: int) -> str:
    """A picture and the records that use it."""
    index, place = pictures.fingerprints.first_use(row)
    users = pictures.fingerprints.users(np.array([row]))
    record = pictures.records[index]
    image = _picture(record.images[place], record.image_names[place])
    caption = f"{record.image_names[place]}\n{names(pictures.records, users)}"
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _picture(source, name: str) -> str:
    """An <img>, or why there is none."""
    if isinstance(source, Video):
        return f"<div>video {escape(name)}</div>"
    try:
        return embedded(load_image(source, name), _SIDE)
    except (ImageError, RecordError) as error:
        return f"<div>{escape(str(error))}</div>"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _details(title: str, lines: Sequence[str], total: int = 0) -> str:
    """A title that opens to lines, with how many of a `total` are not shown."""
    more = [f"and {total - len(lines):,} more"] if total > len(lines) else []
    text = "".join(f"<p>{escape(line)}</p>" for line in [*lines, *more])
    return f"<details><summary>{escape(title)}</summary>{text}</details>"


def _bars(bins: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in bins)
    return _table([(label, count / most, f"{count:,}") for label, count in bins])


def _table(rows: Sequence[tuple[str, float, str]]) -> str:
    """Rows of a label, a bar of that share of the width, and a figure."""
    cells = "".join(
        f'<tr><td>{escape(label)}</td><td class="bar"><div style="width:{share:.1%}"></div></td>'
        f'<td class="count">{escape(figure)}</td></tr>'
        for label, share, figure in rows
    )
    return f"<table>{cells}</table>"


def _cut(text: str) -> str:
    return text if len(text) <= _TURN else f"{text[:_TURN]}…"
