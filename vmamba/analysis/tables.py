"""Numbers for people and for programs: Markdown tables and JSON files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmamba.files import write_text


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a line a row; the keys of the first are the columns, None is shown as a dash."""
    columns = list(rows[0])
    lines = [columns, [":--" if isinstance(rows[0][column], str) else "--:" for column in columns]]
    lines += [[_text(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Raises UserError where the file cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
