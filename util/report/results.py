"""The parts of a report about the results of one run."""

from util.report.html import escaped, grid, numbers, section
from util.safe_json import number, part
from util.summary import METRICS, chance, describe_test

MOST_CLASSES = 200  # in a table
MOST_LINES = 40  # on the data


def result_section(result: dict) -> str:
    """`eval.json` as HTML: numbers of the chosen and of the last epoch, and how they were made."""
    if not result:
        return ""
    items = []
    for key, name in METRICS.items():
        ends = interval(result, key)
        about = small(f"{ends[0]:.2f}–{ends[1]:.2f}") if ends else ""
        items.append((f"{name}, %", f"{result[key]:.2f}{about}"))
    if (count := number(result.get("n"))) is not None:
        items.append(("images tested", f"{count:,.0f}"))
    if (level := chance(result, "uar")) is not None:
        items.append(("UAR by chance, %", f"{level:.1f}"))
    lines = escaped(describe_test([result])), " ".join(_remarks(result)), _small_print(result)
    about = "".join(f'<p class="under">{line}</p>' for line in lines if line)
    return section("Result", numbers(items) + about + _last(result), "result")


def result_heading(result: dict) -> str:
    """`Accuracy 61.75 %, UAR 60.10 %`."""
    return f"Accuracy {result['accuracy']:.2f}\u00a0%, UAR {result['uar']:.2f}\u00a0%"


def class_section(result: dict) -> str:
    """`eval.json` as HTML: recall and precision by class, and what was reported on the data."""
    return section("Classes", _by_class(result) + _data(result))


def _data(result: dict) -> str:
    """What the run reported on its data, what it left out and what differed from training."""
    lines = result.get("report")
    lines = [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []
    if not lines:
        return ""
    shown = "".join(f"<li>{escaped(line.strip())}</li>" for line in lines[:MOST_LINES])
    return f'<h3>Data</h3><ul class="under">{shown}</ul>'


def _remarks(result: dict) -> list[str]:
    """Sentences on how the numbers were obtained."""
    lines = []
    if (epoch := number(result.get("epoch"))) is not None:
        split, chosen_on = (result.get(key) or "" for key in ("split", "selected_on"))
        lines.append(_choice(epoch, escaped(split), escaped(chosen_on)))
    if result.get("weights") == "model_ema":
        lines.append("The weights are an exponential moving average (EMA) over training.")
    if result.get("flip") is True:
        lines.append("Predictions are averaged over each image and its mirror image.")
    if unreadable := number(result.get("unreadable")):
        lines.append(f"Images that could not be read: {unreadable:,.0f}.")
    left_out = part(result, "left_out")
    for name, count in part(left_out, "images").items():
        if (images := number(count)) is not None:
            lines.append(
                f"Left out: {images:,.0f} images of {escaped(name)}, unknown to the model."
            )
    answers = left_out.get("answers")
    if isinstance(answers, list) and answers:
        names = ", ".join(escaped(name) for name in answers[:MOST_CLASSES])
        lines.append(f"Not in the data, so left out of the model's predictions: {names}.")
    for name, values in part(result, "differs_from_training").items():
        if isinstance(values, dict):
            tested, trained = (escaped(values.get(key)) for key in ("tested", "trained"))
            lines.append(f"Tested with {escaped(name)} {tested}; trained with {trained}.")
    return lines


def _choice(epoch: float, split: str, chosen_on: str) -> str:
    """How the epoch was chosen, and how this affects its numbers."""
    if not chosen_on:
        return f"Weights of epoch {epoch:g}."
    if chosen_on == split:
        return (
            f"Epoch {epoch:g} was chosen as the best on this very split, {split}: choosing and "
            "testing on the same images flatters its results, but not those of the last epoch."
        )
    return (
        f"Epoch {epoch:g} was chosen as the best on {chosen_on}; the images tested here were not "
        "used for that."
    )


def _small_print(result: dict) -> str:
    """What the intervals are, and how well calibrated the probabilities are."""
    parts = []
    if interval(result, "accuracy"):
        parts.append("Small: 95\u00a0% interval over test images, without the spread over seeds")
    if (loss := number(result.get("log_loss"))) is not None:
        parts.append(f"log loss {loss:.3f}")
    if (error := number(result.get("ece"))) is not None:
        parts.append(f"calibration error {error:.1f}\u00a0%")
    return f'<span class="soft">{" · ".join(parts)}</span>' if parts else ""


def _last(result: dict) -> str:
    """The chosen and the last epoch, one below the other."""
    last = part(result, "last")
    if all(number(last.get(key)) is None for key in METRICS):
        return ""
    rows = [
        [name, _show(of.get("epoch"), "g"), *(_show(of.get(key)) for key in METRICS)]
        for name, of in (("chosen", result), ("last", last))
    ]
    return grid(["", "epoch", *(f"{name}, %" for name in METRICS.values())], rows)


def _by_class(result: dict) -> str:
    """Recall, precision and number of images of each class."""
    classes = result.get("classes")
    names = [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    recall, precision, support = (part(result, key) for key in ("recall", "precision", "support"))
    rows = [
        [escaped(c), _show(recall.get(c)), _show(precision.get(c)), _show(support.get(c), ",.0f")]
        for c in names[:MOST_CLASSES]
    ]
    return grid(["class", "recall, %", "precision, %", "images"], rows) if rows else ""


def interval(result: dict, metric: str) -> tuple[float, float] | None:
    """The 95 % interval of a metric in %, if the result has one."""
    ends = result.get(f"{metric}_ci")
    ends = [number(end) for end in ends] if isinstance(ends, list) else []
    return (ends[0], ends[1]) if len(ends) == 2 and None not in ends else None


def _show(value: object, style: str = ".2f") -> str:
    return "–" if (finite := number(value)) is None else f"{finite:{style}}"


def small(words: str) -> str:
    """Safe HTML in small print; "" if it is empty."""
    return f"<small>{words}</small>" if words else ""
