"""From the options of fine-tuning to its images and labels, and what is reported about them."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from datasets import LabelledSet, open_labelled, synthetic_size
from datasets.duplicates import duplicate_warnings
from datasets.finetune import choose_splits, take_fraction, test_split
from datasets.labelled import LabelledImages, describe_labelled, digest_of
from datasets.pseudo import read_pseudo_labels, with_pseudo_labels
from datasets.registry import ALIASES, detect_data_set, setting_of
from datasets.unreadable import check_readable
from training.run import same_everywhere
from util.options.parser import Options
from util.options.trained import OF_DATA


class FinetuneData(NamedTuple):
    """The data of `--data_path` and `--eval_data_path`, split as the options say."""

    train_set: LabelledSet
    test_set: LabelledSet
    train: LabelledImages
    tests: dict[str, LabelledImages]  # "test", and "val" with --select val
    splits: dict[str, str]  # which of the owner's splits each of them is
    notes: list[str]
    pseudo_labelled: int = 0  # images at the end of `train`

    @property
    def digest(self) -> str:
        """The digest of all images and labels that training or the choice of an epoch uses."""
        return digest_of(self.train.digest, *(images.digest for images in self.tests.values()))

    def counted(self) -> str:
        """How many images there are, such as `42 train and 14 val images`."""
        parts = {"train": self.train, **self.tests}
        return " and ".join(f"{len(images):,} {name}" for name, images in parts.items()) + " images"

    def owner(self, split: str) -> LabelledSet:
        """The data set to which the test images of a split belong."""
        return self.test_set if split == "test" else self.train_set


def open_data(
    args: argparse.Namespace, trained: Mapping[str, Any], learns: bool = True
) -> FinetuneData:
    """The images and labels, the same on all ranks; `train` is empty unless the program `learns`.

    `trained`: see `open_labelled`.
    """
    options = {"face_margin": args.face_margin, "size": synthetic_size(args.input_size)}
    rules, other_rules = _rules(args)

    def build() -> FinetuneData:
        pseudo_labelled = 0
        own = open_labelled(
            args.data_path,
            args.data_set,
            nb_classes=args.nb_classes,
            trained=trained,
            **rules,
            **options,
        )
        tested = None
        if args.eval_data_path:
            usual = {**trained, **own.options} if learns else trained
            tested = open_labelled(args.eval_data_path, trained=usual, **other_rules, **options)
        if learns:
            train, tests, splits, notes = choose_splits(
                own,
                tested,
                select=args.select,
                share=args.val_fraction,
                seed=args.seed,
                path=args.data_path,
            )
            train = take_fraction(train, args.label_fraction, args.seed)
            check_readable(train.source)
            if args.pseudo_labels and not args.knn:
                more, lines = read_pseudo_labels(args.pseudo_labels, own.classes)
                train, notes = with_pseudo_labels(train, more), [*notes, *lines]
                pseudo_labelled = len(more)
        else:
            name, notes = test_split(tested or own, "--eval_data_path" if tested else "--data_path")
            tests, splits = {"test": (tested or own).splits[name]}, {"test": name}
            train = tests["test"].take(np.zeros(0, int))
        for images in tests.values():
            check_readable(images.source)
        tests = {} if args.disable_eval else tests
        return FinetuneData(
            own,
            tested or own,
            train=train,
            tests=tests,
            splits=splits,
            notes=notes,
            pseudo_labelled=pseudo_labelled,
        )

    return same_everywhere(f"--data_path {args.data_path}", build, lambda data: data.digest)


def _rules(args: argparse.Namespace) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """`--label_rule` and `--label_order` for the set of `--data_path`, and for `--eval_data_path`.

    An option that only the latter has applies to that alone.
    """
    rules = {"label_rule": args.label_rule, "label_order": args.label_order}
    if not args.eval_data_path or not any(rules.values()):
        return rules, {}
    other = setting_of(detect_data_set(args.eval_data_path))
    name = ALIASES.get(args.data_set, args.data_set)
    own = setting_of(detect_data_set(args.data_path) if name == "auto" else name)
    for_other = {option: value for option, value in rules.items() if option == other}
    for_own = {o: v for o, v in rules.items() if o not in for_other or o == own}
    if "label_order" in for_own:  # the other set is matched to its classes
        for_other.pop("label_order", None)
    return for_own, for_other


def report(data: FinetuneData) -> list[str]:
    """Log lines on the data: counts, what is missing or left out, images in more than one split.

    Reads files to find those: for rank 0 only.
    """
    lines = describe_labelled(data.train_set) if len(data.train) else []
    if data.test_set is not data.train_set or not lines:
        lines += ["tested on:", *describe_labelled(data.test_set)]
    train = data.train if len(data.train) else data.test_set.splits.get("train")
    splits = {"train": train, **data.tests} if train else data.tests
    return [*lines, *data.notes, *duplicate_warnings(splits)]


def describe_data(args: argparse.Namespace, data: FinetuneData) -> dict[str, object]:
    """The data, as recorded in `config.json`."""
    return {
        "path": args.data_path,
        "set": data.train_set.title,
        "rule": data.train_set.rule,
        "count": len(data.train),
        "pseudo_labelled": data.pseudo_labelled,
        "digest": data.digest,
    }


def with_data_options(args: Options, data: FinetuneData) -> Options:
    """The options, with those of OF_DATA as they took effect when the data were read.

    They are the training set's; those on labels are the test set's if only that has them.
    """
    options = {name: data.train_set.options.get(name) for name in OF_DATA}
    for name in ("label_rule", "label_order"):
        options[name] = options[name] or data.test_set.options.get(name)
    return args.but(**options)


def config_options(args: Options, data: FinetuneData) -> dict[str, object]:
    """The options to record in `config.json`, which repeat the run, test set included."""
    margin = data.test_set.options.get("face_margin")
    return {**vars(args), "face_margin": margin if args.face_margin is None else args.face_margin}


def about(
    args: argparse.Namespace, data: FinetuneData, split: str, lines: Sequence[str]
) -> dict[str, object]:
    """What eval.json records about the data besides the metrics. `lines`: see `report`."""
    owner = data.owner(split)
    return {
        "data": owner.title,
        "rule": owner.rule,
        "split": data.splits[split],
        "flip": args.eval_flip,
        "report": list(lines),
    }
