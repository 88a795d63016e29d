"""The published tables in one figure: accuracy against multiply-adds, and against the speed measured here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from vmamba.analysis.plotting import STYLE, line_style, new_figure, place_labels, save_figure
from vmamba.analysis.speed import MODES
from vmamba.analysis.tables import check_json, read_table, write_json
from vmamba.errors import UserError, unknown
from vmamba.files import read_text
from vmamba.models.published import PUBLISHED, Row
from vmamba.text import counted, printable


@dataclass(frozen=True)
class Panel:
    title: str
    number: str  # of the row's, which is drawn
    page: str  # with the speeds


PANELS = {  # by the row's table
    "classification": Panel("ImageNet-1K", "top-1", "throughput-gpu.md"),
    "detection": Panel("COCO, Mask R-CNN", "box AP", "detection-speed.md"),
    "segmentation": Panel("ADE20K, UperNet", "mIoU", "segmentation-speed.md"),
}
_CONFIG = re.compile(
    r"(?:\w+/(?:mask_rcnn|upernet)_)?(?P<backbone>[a-z]+_(?P<size>tiny|small|base)(?:_(?P<kind>s\dl\d+))?)"
    r"(?:_(?P<setting>1x|3x|\d+))?"
)


FAMILIES = {  # the number of its colour and marker
    "VMamba": 0,
    "VMamba[s1l]": 1,
    "VMamba[s2l]": 2,
    "Swin": 6,
    "DeiT": 3,
}
LONGER = dict(markerfacecolor="white", linestyle="--")  # schedule of training


@dataclass(frozen=True)
class Point:
    """A row of the tables."""

    table: str
    name: str
    family: str  # "VMamba[s1l]"; those of one have one colour
    kind: str  # "s1l8" in it, or nothing
    label: str  # "T", or "S 640"
    setting: str  # schedule, or the image's size where it is not the usual one
    accuracy: float  # percent, published
    gflops: float  # of multiply-adds, published; of VMamba's classifiers counted here, which rounds to it
    speed: float | None  # images a second, measured here; None where it was not


@dataclass(frozen=True)
class Speeds:
    """What a page of measurements says of one mode."""

    where: str  # card and type of numbers, batch and size; in two lines
    of: Mapping[tuple[str, str], float]  # (backbone, size where it is not the usual one): images a second


def tradeoff(*, docs: str = "docs", mode: str = "forward", output: str = "output/tradeoff") -> list[Point]:
    """Draw every row of the published tables, and write tradeoff.{pdf,png,json} into `output`.

    Args:
        docs: folder with the pages that `analyze/throughput.py` and `analyze/tasks_speed.py` wrote; the first table of
            each counts.  Of a row that is in none, or whose page is not there, no speed is drawn.
        mode: "forward" or "train", of the speeds.

    Returns the rows.  Raises UserError for an unknown mode, and a folder without pages or with one of another form.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    check_json(Path(output, "tradeoff.json"), "speeds", "mode", "rows")
    pages = {table: Path(docs, panel.page) for table, panel in PANELS.items()}
    speeds = {table: read_speeds(page, mode) for table, page in pages.items() if page.is_file()}
    if not speeds:
        names = ", ".join(page.name for page in pages.values())
        raise UserError(f"'{printable(docs)}' has none of {names}; name the folder with --docs")
    points = [point(row, speeds.get(row.table)) for row in PUBLISHED if PANELS[row.table].number in row.numbers]
    plot(points, speeds, mode, Path(output) / "tradeoff")
    write_json(
        Path(output) / "tradeoff.json",
        {
            "speeds": {table: found.where for table, found in speeds.items()},
            "mode": mode,
            "rows": [asdict(each) for each in points],
        },
    )
    for table in PANELS:
        own = [each for each in points if each.table == table]
        print(f"{table}: {counted(len(own), 'row')}, {sum(each.speed is not None for each in own)} of them measured")
    print(f"written to {output}")
    return points


def point(row: Row, speeds: Speeds | None) -> Point:
    found = _CONFIG.fullmatch(row.config)
    kind, setting = found["kind"] or "", found["setting"] or ""
    family = re.match(r"(?:.*, )?(\w+)-", row.name)[1]
    size = setting if setting.isdecimal() else ""
    return Point(
        row.table,
        row.name,
        f"{family}[{kind[:3]}]" if kind else family,
        kind,
        f"{found['size'][0].upper()} {size}".strip(),
        setting,
        row.numbers[PANELS[row.table].number],
        row.gflops,
        speeds.of.get((found["backbone"], size)) if speeds else None,
    )


def read_speeds(page: Path, mode: str) -> Speeds:
    """Raises UserError for a page that cannot be read or is not of `speed`'s or `tasks_speed`'s form."""
    text = read_text(page)
    rows = [row for row in read_table(text) if row.get("mode") == mode and _number(row.get("images/s", ""))]
    device = re.search(r"^(.+?), PyTorch ", text, re.M)
    if not rows or not device:
        raise UserError(
            f"'{printable(page)}' has no table of {mode} speeds with the card above it, as analyze/throughput.py and "
            f"analyze/tasks_speed.py write it; measure again with --markdown"
        )
    if "batch" in rows[0]:  # of classifiers, whose cases are in the rows: the largest batch of the first type
        rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
        most = max(_number(row["batch"]) for row in rows)
        rows = [row for row in rows if _number(row["batch"]) == most]
        case, usual = (rows[0]["dtype"], f"batch {most:g}", "224 x 224"), "224"
    else:
        found = re.search(r"(\w+), (?:fused )?AdamW, (batch \d+), images of (\d+ x \d+)", text)
        if not found:
            raise UserError(f"'{printable(page)}' does not say type, batch and size; measure again with --markdown")
        case, usual = found.groups(), ""
    of = {}
    for row in rows:
        backbone = re.sub(r"^timm/|_patch.*", "", row["model"])
        size = row.get("size", usual)
        of[backbone, "" if size == usual else size] = _number(row["images/s"])
    return Speeds(f"{device[1]}, {case[0]}\n{case[1]}, {case[2]}", of)


def _number(text: str) -> float | None:
    """None for what is none, such as "out of memory"."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def plot(points: Sequence[Point], speeds: Mapping[str, Speeds], mode: str, path: Path) -> None:
    """A column a task; above against multiply-adds, below against images a second."""
    styles = {family: line_style(number) for family, number in FAMILIES.items()}
    with rc_context(STYLE | {"font.size": 8, "axes.titlesize": 8}):
        figure = new_figure(7.6, 5.8)
        grid = figure.subplots(2, len(PANELS))
        labels = []
        for (above, below), (table, panel) in zip(grid.T, PANELS.items(), strict=True):
            own = [each for each in points if each.table == table]
            measured = [each for each in own if each.speed is not None]
            labels.append((above, _draw(above, [(each.gflops, each) for each in own], styles)))
            labels.append((below, _draw(below, [(each.speed, each) for each in measured], styles)))
            above.set(title=panel.title, xlabel="multiply-adds (G), published")
            if table == "classification":  # from 4.5 to 55
                above.set_xscale("log")
                above.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                above.xaxis.set_minor_locator(NullLocator())
                above.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            where = speeds[table].where if table in speeds else "no page of measurements yet"
            below.set(xlabel=f"images/s, {mode}, measured here\n{where}", ylim=above.get_ylim())
            below.set_xlim(0, 1.1 * max((each.speed for each in measured), default=1))
            if not measured:
                below.set_xticks([])
            below.set_title(f"{len(measured)} of {counted(len(own), 'row')} measured")
            for axes in (above, below):
                axes.set_ylabel(f"{panel.number} (%), published")
        figure.legend(handles=_legend(points, styles), loc="outside lower center", ncols=3)
        figure.draw_without_rendering()  # after it everything has its place
        for axes, texts in labels:
            place_labels(axes, texts)
        save_figure(figure, path, dpi=160)


def _draw(
    axes: Axes, points: Sequence[tuple[float, Point]], styles: Mapping[str, Mapping[str, object]]
) -> list[tuple[float, float, str, str]]:
    """Draw (x, point) and lines through those of one family and setting; return (x, y, label, colour) of each."""
    lines: dict[tuple[str, str], list[tuple[float, Point]]] = {}
    for x, each in sorted(points, key=lambda pair: pair[1].gflops):
        lines.setdefault((each.family, each.setting), []).append((x, each))
    for (family, setting), own in lines.items():
        style = dict(linewidth=0.8, markersize=5, **styles[family]) | (LONGER if setting == "3x" else {})
        axes.plot([x for x, _ in own], [each.accuracy for _, each in own], **style)
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    return [(x, each.accuracy, each.label, styles[each.family]["color"]) for x, each in points]


def _legend(points: Sequence[Point], styles: Mapping[str, Mapping[str, object]]) -> list[Line2D]:
    handles = []
    for family, style in styles.items():
        kinds = dict.fromkeys(each.kind for each in points if each.family == family and each.kind)
        name = f"VMamba[{', '.join(kinds)}]" if kinds else {"VMamba": "VMamba, January 2024"}.get(family, family)
        handles.append(Line2D([], [], linewidth=0.8, markersize=5, label=name, **style))
    handles.append(Line2D([], [], linewidth=0.8, markersize=5, color="gray", marker="o", label="3x schedule", **LONGER))
    return handles
