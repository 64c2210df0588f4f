"""The first part of a report on several runs: what was compared, a bar chart, tables."""

from collections.abc import Sequence

from util.report.html import escaped, grid
from util.report.results import interval, small
from util.summary import (
    METRICS,
    TEST,
    Group,
    agreed,
    chance,
    conditions,
    describe_run,
    describe_test,
    is_flattered,
    paired_difference,
)

CHARTS = ("uar", "accuracy")
MOST_NAMED = 4  # groups, in title and sentence
LONG_NAMES = {"uar": "Mean class accuracy (UAR), %", "accuracy": "Accuracy, %"}


def title_of(groups: Sequence[Group]) -> str:
    """The heading of a comparison, as plain text; "" for fewer than two results."""
    results = sum(len(group.results) for group in groups)
    if results < 2:
        return ""
    names = [group.name for group in groups]
    if len(names) == 1:
        return f"{names[0]}, {results} seeds"
    return (
        _listed(names) + " compared"
        if len(names) <= MOST_NAMED
        else f"{len(names)} models compared"
    )


def comparison(groups: Sequence[Group]) -> str:
    """Chart and tables of at least two results, a row per group with its mean over seeds.

    If any epoch was chosen on the test images, all runs are compared at their last epochs: the best
    of many flatters more than the best of few.
    """
    flattered = any(map(is_flattered, _results(groups)))
    last = [group.at_last_epochs() for group in groups] if flattered else [None]
    shown = groups if None in last else last
    parts = [
        f"<header><h1>{escaped(title_of(groups))}</h1>",
        *(f'<p class="under">{line}</p>' for line in _about(groups, shown)),
        f'</header><div class="charts">{"".join(_chart(shown, metric) for metric in CHARTS)}</div>',
        _table(shown),
        _difference(shown),
    ]
    if shown is not groups:
        parts += ["<h3>The best epoch of each run</h3>"]
        parts += [_table(groups, described=False)]
    return f'<article class="comparison">{"".join(parts)}</article>'


def _results(groups: Sequence[Group]) -> list[dict]:
    """The results of all runs."""
    return [result for group in groups for result in group.results]


def _is_one_test(groups: Sequence[Group]) -> bool:
    """Whether all runs were tested on the same data, as far as their results tell."""
    first, *others = _results(groups)
    return all(result.get(key) == first.get(key) for result in others for key in TEST)


def _about(groups: Sequence[Group], shown: Sequence[Group]) -> list[str]:
    """Sentences on what was compared, on chance, and on the epochs."""
    results = _results(groups)
    count = f"{len(results)} runs"
    if len(groups) < len(results) and 1 < len(groups) <= MOST_NAMED:
        count += ": " + _listed([f"{len(group.results)} of {group.name}" for group in groups])
    first = results[0]
    if _is_one_test(groups):
        tested = f"each tested on {escaped(first.get('n'))} images"
        lines = [f"{escaped(count)}, {tested} ({escaped(describe_test([first]))})."]
        levels = [_level(first, metric) for metric in CHARTS]
        if None not in levels:
            lines[0] += (
                f" Chance level: UAR {levels[0]}\u00a0%; always answering the most frequent class "
                f"gives an accuracy of {levels[1]}\u00a0%."
            )
    else:
        lines = [f"{escaped(count)}, tested under different conditions: compare with care."]
    if flattered := sum(map(is_flattered, results)):
        which = "best" if shown is groups else "last"
        who = "these runs" if flattered == len(results) else "some of these runs"
        lines.append(
            f"Compared at the {which} epoch of each run. Choosing the best epoch on the images "
            f"tested, as {who} did, flatters."
        )
    return lines


def _level(result: dict, metric: str) -> str | None:
    level = chance(result, metric)
    return None if level is None else f"{level:.1f}"


def _chart(groups: Sequence[Group], metric: str) -> str:
    """A bar per group from 0 to 100 %, with chance, seeds or interval, and the value."""
    bars, legend = [], {}
    for group in groups:
        spread = group.spread(metric)
        marks = f'<i class="fill" style="width:{_place(spread.mean)}"></i>'
        level = chance(group.results[0], metric)
        if level is not None:
            marks += f'<i class="chance" style="left:{_place(level)}"></i>'
            word = "chance" if metric == "uar" else "always the most frequent class"
            legend["chance"] = f"{word}, {level:.1f}\u00a0%"
        ends = interval(group.results[0], metric)
        if spread.values[1:]:
            dots = (f'<i class="dot" style="left:{_place(value)}"></i>' for value in spread.values)
            marks += "".join(dots)
            legend["dot"] = "single seeds"
        elif ends:
            low, high = (max(0.0, min(100.0, end)) for end in ends)
            marks += (
                f'<i class="range" style="left:{low:.2f}%;width:{max(0, high - low):.2f}%"></i>'
            )
            legend["range"] = "95\u00a0% interval"
        bars.append(
            f'<div class="bar"><span>{escaped(group.name)}</span>'
            f'<span class="track">{marks}</span><span>{spread.show()}</span></div>'
        )
    if len({_level(group.results[0], metric) for group in groups}) > 1:
        legend["chance"] = "chance"
    keys = "".join(f'<span><i class="{kind}"></i>{word}</span>' for kind, word in legend.items())
    return (
        f'<figure class="bars"><h3>{LONG_NAMES[metric]}</h3>{"".join(bars)}'
        f'<figcaption class="keys">{keys}</figcaption></figure>'
    )


def _place(value: float) -> str:
    return f"{max(0.0, min(100.0, value)):.2f}%"


def _table(groups: Sequence[Group], described: bool = True) -> str:
    """A row per group: what it is, mean and deviation of each metric, its seeds or interval."""
    rows, notes = [], {}
    for group in groups:
        word = "seeds " if group.seeds[1:] else "seed " if group.seeds else ""
        kinds = dict.fromkeys(filter(None, map(describe_run, group.folders)))
        about = [" / ".join(kinds) * described, word + ", ".join(map(str, group.seeds))]
        if not _is_one_test(groups):
            about.append(f"{agreed(group.results, 'n')} images, {conditions(group.results)}")
        name = escaped(group.name) + "".join(small(escaped(line)) for line in about)
        rows.append([name, *(_spread(group, key) for key in METRICS)])
        if group.results[1:]:
            notes["±: standard deviation (n − 1) over seeds; small: their values."] = None
        elif interval(group.results[0], "accuracy"):
            notes["Small, of a single run: 95\u00a0% interval over the test images."] = None
    table = grid(["", *(f"{name}, %" for name in METRICS.values())], rows)
    return table + (f'<p class="under soft">{" ".join(notes)}</p>' if notes else "")


def _spread(group: Group, metric: str) -> str:
    spread = group.spread(metric)
    single = " · ".join(f"{value:.2f}" for value in spread.values)
    ends = interval(group.results[0], metric)
    alone = f"{ends[0]:.2f}–{ends[1]:.2f}" if ends else ""
    return spread.show().replace("± ", "±\u00a0") + small(single if spread.values[1:] else alone)


def _difference(groups: Sequence[Group]) -> str:
    """The comparison of two groups with the same seeds."""
    seeded = [group for group in groups if group.seeds]
    parts = []
    for metric in ("accuracy", "uar"):
        if difference := paired_difference(seeded, metric):
            values = difference.values
            better, equal = sum(v > 0 for v in values), sum(v == 0 for v in values)
            shown = difference.show("+").replace(" ", "\u00a0")
            ties = f", equal in {equal}" if equal else ""
            parts.append(
                f"{METRICS[metric]} <strong>{shown}</strong> points "
                f"(higher in {better} of {len(values)} seeds{ties})"
            )
    if not parts:
        return ""
    first, second = (escaped(group.name) for group in seeded)
    return f"<p><strong>{first}</strong> minus {second}, seed by seed: {', '.join(parts)}.</p>"


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
