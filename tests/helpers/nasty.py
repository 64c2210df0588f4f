"""Values that are likely to break programs, and how many examples hypothesis tries."""

import pytest
from hypothesis import HealthCheck, settings

CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def tries(few, many):
    """Run a test on `few` examples, always the same; in `make test-long`, on `many` new ones."""
    always = settings(max_examples=few, derandomize=True, **CALM)
    new = pytest.param(settings(max_examples=many, **CALM), marks=pytest.mark.long)
    return pytest.mark.parametrize("tried", [always, new], ids=["few", "many"])


NASTY = [
    *(
        "",
        " ",
        "0",
        "-0",
        "1",
        "-1",
        "2",
        "7",
        "0.5",
        "1e3",
        "1e-320",
        "1e400",
        "nan",
        "inf",
        "-inf",
    ),
    *("1" + "0" * 30, "-1" + "0" * 30, "9" * 400, "9" * 5000, "1e30", "1_000", "0x10", " 5 ", "+3"),
    *(
        "٣",
        "²",
        "½",
        "𝟝",
        "true",
        "False",
        "maybe",
        "None",
        "[]",
        "16:48",
        "48:16",
        "0:0",
        ":",
        "a:b",
    ),
    *(
        "a\nb",
        "\r",
        "\t",
        "\x1b[31m",
        "caf\udce9",
        "\udcff",
        "a\0b",
        "é" * 4000,
        "/" * 4000,
        "..",
        "~",
    ),
    *(
        "~no_such_user_/x",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "%s%n",
        "{0}",
        "$HOME",
        "`id`",
        "--",
    ),
    *(
        "@",
        "@nowhere",
        "@/dev/null",
        "@self.args",
        "@binary.args",
        "@quote.args",
        "@.",
        "@a\0b",
        "@@",
    ),
    *(
        "cpu",
        "synthetic:0",
        "synthetic:-1",
        "synthetic:٣",
        "mae_vit_tiny_patch16",
        "convnextv2_atto",
    ),
]
