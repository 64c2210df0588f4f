"""Reads files that may be missing, truncated or malformed: unreadable means empty, not an error."""

import json
from pathlib import Path


def number(value: object) -> float | None:
    """`value` as a float if it is a finite number, small enough to plot; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None  # NaN compares false, too


def part(value: dict, key: str) -> dict:
    """value[key] if it is an object, else {}."""
    return value[key] if isinstance(value.get(key), dict) else {}


def read_text(path: Path) -> str:
    """The text of a file; "" if it cannot be read."""
    try:
        return path.read_text("utf-8", "replace") if path.is_file() else ""
    except OSError:
        return ""


def parse_object(text: str) -> dict:
    """A JSON object; {} if the text holds none (truncated, nested too deeply, another type)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
