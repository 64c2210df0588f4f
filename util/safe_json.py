"""Reading what may be missing, torn or anything else: what cannot be read is empty, not fatal."""

import json
from pathlib import Path


def number(value: object) -> float | None:
    """`value` as a float when it is a finite number of a size one can plot, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None  # NaN compares false, too


def part(value: dict, key: str) -> dict:
    """value[key] when it is an object, else {}."""
    return value[key] if isinstance(value.get(key), dict) else {}


def read_text(path: Path) -> str:
    """The text of a file, "" when there is none that can be read."""
    try:
        return path.read_text("utf-8", "replace") if path.is_file() else ""
    except OSError:
        return ""


def parse_object(text: str) -> dict:
    """A JSON object, {} when the text holds none (torn, nested beyond reason, another type)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
