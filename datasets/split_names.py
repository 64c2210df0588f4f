"""Recognises the usual names of training, validation and test splits."""

import re

# train, Training, train_set, TrainImages, 1-train; valid, val_set, PublicTest (FER2013's); test, …
_NAME = re.compile(
    r"(?:\d+[ _-]*)?"
    r"(?:(?P<train>train(?:ing)?)"
    r"|(?P<val>val(?:id(?:ation)?)?|dev(?:elopment)?|public[ _-]*test)"
    r"|(?P<test>test(?:ing)?|private[ _-]*test|eval(?:uation)?))"
    r"(?:[ _-]*(?:set|split|data|images?|faces?))*",
    re.IGNORECASE,
)


def split_called(name: str) -> str | None:
    """`train`, `val` or `test` if a name, in any case, stands for that split; else None."""
    match = _NAME.fullmatch(name.strip())
    return match and match.lastgroup
