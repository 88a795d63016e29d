"""Numbers for people and for programs: in words, as Markdown tables and from them, as files of JSON and of tensors."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vmamba.errors import UserError
from vmamba.files import check_replaces, check_writable, make_folder, read_text, write_atomically, write_text
from vmamba.text import printable

_OURS = "file of this command"


def parameters(*counts: int) -> str:
    """ "30.2M parameters"; of one model whose number differs from case to case "22.1M to 23.2M parameters"."""
    texts = (f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e6:.3g}M" for count in (min(counts), max(counts)))
    return " to ".join(dict.fromkeys(texts)) + " parameters"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a line a row; the keys of the first are the columns, None is shown as a dash."""
    columns = list(rows[0])
    lines = [columns, [":--" if isinstance(rows[0][column], str) else "--:" for column in columns]]
    lines += [[_text(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of the first table in a page that `markdown` has written, each by column; none of a page without."""
    lines: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("| "):
            lines.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif lines:
            break
    return [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


def replace_table(page: Path, text: str) -> None:
    """Put `text` between the lines "<!-- table -->" and "<!-- end -->" of a page.  Raises UserError without
    them."""
    before, after = around_table(page)
    write_text(page, f"{before}\n{text}\n{after}")


def around_table(page: Path) -> tuple[str, str]:
    """What stands in a page before and behind its table.  Raises UserError where it has no place for one."""
    before, start, rest = read_text(page).partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not end:
        raise UserError(
            f"'{printable(page)}' has no lines <!-- table --> and <!-- end -->; put them where the table goes"
        )
    return before + start, end + after


def read_json(path: Path) -> Any:
    """Raises UserError where the file cannot be read."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"'{printable(path)}' is no JSON: {error}; remove it, and run again what wrote it") from error


def check_json(path: Path, *names: str) -> None:
    """That results can be written at `path`, and take the place of none but earlier ones: a file of `names` with their
    values, or a list of such.  Raises UserError otherwise."""
    check_writable(path)
    check_replaces(path, lambda there: {*names} <= _first(read_json(there)).keys(), _OURS)


def check_page(path: str | Path, beginning: str) -> None:
    """Likewise of a page, which begins as the pattern `beginning` says.  Raises UserError otherwise."""
    check_writable(path)
    check_replaces(path, lambda there: bool(re.match(beginning, read_text(there), re.DOTALL)), _OURS)


def _first(content: Any) -> dict[str, Any]:
    return content[0] if isinstance(content, list) else content


def write_json(path: Path, content: Any) -> None:
    """Raises UserError where the file cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_tensors(path: Path, content: Any) -> None:
    """As `torch.save` does.  Raises UserError where the file cannot be written."""
    make_folder(path.parent)
    write_atomically(path, lambda file: torch.save(content, file))


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
