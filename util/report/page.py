"""One page about one run: `python -m util.report OUTPUT_DIR` writes OUTPUT_DIR/report.html.

The page is a single file – figures and curves embedded, no scripts, nothing loaded – that can be
mailed, archived with the weights and read on a phone. It is made from what the folder holds and can
be made again at any time; everything read is treated as untrusted text.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from string import Template

from util.files import write_file
from util.report.comparison import comparison, title_of
from util.report.curves import learning_curves
from util.report.drawing import short
from util.report.figure_section import figures_section
from util.report.html import escaped, numbers, picture, section
from util.report.results import class_section, result_heading, result_section
from util.safe_json import number, parse_object, part, read_text
from util.summary import describe_run, group_runs, read_log, read_result, short_names

FIGURE_BYTES = 6_900_000  # of PNG; 9.2 MB as base64, so that the page stays below 10
STATUS = {
    "done": ("good", "done"),
    "resumable": ("warn", "stopped, can be resumed"),
    "bad_input": ("bad", "bad input"),
    "failed": ("bad", "failed"),
    "": ("soft", "unfinished"),
}


def write_report(*output_dirs: str | Path, page: str | Path | None = None) -> Path | None:
    """Write one page about one or several runs from what their folders hold; return its path.

    Results of several runs are compared first; runs with a result come before others, and of runs
    GROUP/seed-N with a result, only the first is shown in full. `page`: the file to write (default:
    report.html in the first folder). Every input may be missing or truncated: what cannot be read
    is not shown. Returns None if one of `output_dirs` is not a directory. Raises OSError if the
    page cannot be written (disk full, folder read-only), and leaves the old one. A finished run
    should catch this: the page can be made again at any time.
    """
    folders = [Path(output_dir) for output_dir in output_dirs]
    if not all(folder.is_dir() for folder in folders):
        return None
    page = Path(page) if page else folders[0] / "report.html"
    groups = group_runs(folders)
    folded = {folder for group in groups for folder in group.folders[1:]}
    shown = [folder for folder in folders if folder not in folded]
    shown.sort(key=lambda folder: not read_result(folder))
    names = short_names([folder.resolve() for folder in shown])
    runs = [
        _run(folder, name, alone=len(shown) == 1, room=FIGURE_BYTES // len(shown))
        for folder, name in zip(shown, names, strict=True)
    ]
    title = escaped(title_of(groups))
    if title:
        runs = [comparison(groups), *runs]
    title = title or " · ".join(map(escaped, names))
    template = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    html_text = template.substitute(title=title, runs="\n".join(runs))
    # A file name may hold bytes that are not text; each is shown as a question mark.
    write_file(page, html_text.encode("utf-8", "replace"))
    return page


def _run(folder: Path, name: str, alone: bool, room: int) -> str:
    """A run's part of the page, with at most `room` bytes of pictures.

    Alone on a page, an evaluated run has its result as heading; beside others, a run has its name.
    """
    epochs, result = read_log(folder), read_result(folder)
    config, status = (parse_object(read_text(folder / f"{n}.json")) for n in ("config", "status"))
    command = config.get("command")
    kind, word = STATUS.get(
        str(status.get("status") or ""), ("soft", escaped(status.get("status")))
    )
    speed = _headline(epochs, config, bool(result))
    curves = "".join(map(picture, learning_curves(epochs, str(folder))))
    curves = f'<div class="curves">{curves}</div>' if curves else ""
    figures, others = figures_section(folder / "figures", room)
    sections = [
        result_section(result),
        figures,
        class_section(result),
        others,
        section("Training" if result else "Curves", speed * bool(result) + curves),
        section("Command", f"<pre><code>{escaped(command)}</code></pre>" if command else ""),
        _bad_images(folder / "bad_images.txt"),
        _tables(config),
    ]
    about = " · ".join(map(escaped, filter(None, (name * alone, describe_run(folder)))))
    reason = f'<p class="reason {kind}"><span>{escaped(status.get("reason"))}</span></p>'
    header = [
        f"<h1>{result_heading(result) if alone and result else escaped(name)}</h1>",
        f'<p class="under soft"><span class="status {kind}">{word}</span> {about}</p>',
        reason if status.get("reason") else "",
        "" if result else speed,
    ]
    body = "\n".join(filter(None, sections)) or '<p class="soft">Nothing recorded yet.</p>'
    top = "\n".join(filter(None, header))
    return f"<article>\n<header>\n{top}\n</header>\n{body}\n</article>"


def _headline(epochs: list[dict], config: dict, evaluated: bool) -> str:
    """The most important numbers, as far as they are known."""
    summaries: list[tuple[str, str, Callable[[list[float]], str]]] = [
        ("train_loss", "loss, first → last", lambda y: f"{short(y[0], 3)} → {short(y[-1], 3)}"),
        ("epoch_s", "total time", lambda y: _duration(sum(y))),
        ("images_per_s", "images per second, median", lambda y: short(statistics.median(y))),
        ("data_wait", "of the time spent waiting for data", lambda y: f"{statistics.mean(y):.1%}"),
        ("skipped_steps", "skipped steps", lambda y: short(sum(y))),
    ]
    if not evaluated:  # otherwise the result shows it, with how it was chosen
        summaries.insert(1, ("test_acc1", "best test accuracy, %", lambda y: short(max(y))))
    planned = number(part(config, "options").get("epochs"))
    of = f" of {short(planned)}" if planned and planned != len(epochs) else ""
    items = [("epochs", f"{len(epochs):,}{of}")] if epochs else []
    for key, label, show in summaries:
        if finite := [y for entry in epochs if (y := number(entry.get(key))) is not None]:
            items.append((label, show(finite)))
    if parameters := number(part(config, "model").get("parameters")):
        items.append(("parameters", f"{short(parameters / 1e6, 3)} M"))
    if images := number(part(config, "data").get("count")):
        items.append(("images", short(images)))
    return numbers(items)


def _bad_images(path: Path) -> str:
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        return ""
    shown = "\n".join(map(escaped, lines[:10]))
    rest = f"<p>… and {len(lines) - 10:,} more in bad_images.txt</p>" if lines[10:] else ""
    return section(f"Unreadable images: {len(lines):,}", f"<pre><code>{shown}</code></pre>{rest}")


def _tables(config: dict) -> str:
    """Options, model, data and versions, collapsed."""
    parts = {key: dict(part(config, key)) for key in ("options", "model", "data", "versions")}
    if config.get("git_commit"):
        parts["versions"]["git commit"] = config["git_commit"]
    row = '<tr><th scope="row">{}</th><td>{}</td></tr>'
    tables = "".join(
        f'<details><summary>{title.capitalize()} <span class="soft">{len(rows)}</span></summary>'
        '<div class="scroll"><table>'
        f"{''.join(row.format(escaped(key), escaped(value)) for key, value in rows.items())}"
        "</table></div></details>"
        for title, rows in parts.items()
        if rows
    )
    return f'<section class="more">{tables}</section>' if tables else ""


def _duration(seconds: float) -> str:
    """42 s · 12 min 5 s · 3 h 12 min · 2 d 3 h."""
    rest, parts = round(seconds), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
