"""Fine-tuning: batch loss, head and learning rates of the classifier, evaluation, results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import trunc_normal_
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from datasets.transforms import Normalise
from engine_train import Position, TrainState
from training.distill import Teacher
from training.evaluate import Evaluation, TestSet, evaluate_model
from training.gradients import BatchLoss
from training.precision import Precision
from util.files import write_json
from util.optim import layer_decay_scale
from util.predictions import write_predictions
from util.report.charts import class_figure, confusion_figure, reliability_figure
from util.report.figures import save_png

# The metrics in log.txt, by the official scripts' short names.
LOGGED = {"loss": "log_loss", "acc1": "accuracy", "uar": "uar", "f1": "macro_f1"}
OF_LAST = ("accuracy", "accuracy_ci", "uar", "uar_ci", "macro_f1")
Batch = tuple[Tensor, Tensor, list[str]]  # (N, 3, S, S) uint8, (N, K) distributions, problems


class ClassifierLoss(BatchLoss):
    """Normalise, erase, smooth, mix; cross-entropy, distil.

    All labels are distributions, so votes, smoothing and mixing need no special cases.
    """

    def __init__(
        self,
        normalise: Normalise,
        smoothing: float = 0.0,
        mix: Mixup | None = None,
        erase: RandomErasing | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """`mix` must take dense targets (`multi_label`) and must not smooth labels itself."""
        self.normalise = normalise
        self.smoothing, self.mix, self.erase, self.teacher = smoothing, mix, erase, teacher
        self.cross_entropy = SoftTargetCrossEntropy()
        self.problems: set[str] = set()  # unreadable images of this rank, not yet collected

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See BatchLoss: what the model sees, and what it should answer."""
        imgs, targets, problems = batch
        self.problems.update(problem for problem in problems if problem)
        x = self.normalise(imgs)
        if self.erase:
            x = self.erase(x)
        targets = (1 - self.smoothing) * targets + self.smoothing / targets.shape[1]
        if self.mix:
            x, targets = self.mix(x, targets)
        return x, targets

    def loss(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of one micro-batch, combined with the teacher's loss if any."""
        logits = model(x)
        loss = self.cross_entropy(logits, targets)
        return self.teacher(x, logits, loss) if self.teacher else loss

    def blank_batch(self, batch_size: int, input_size: int, classes: int) -> Batch:
        """A batch of zeros, for a pass whose result is discarded."""
        imgs = torch.zeros(batch_size, 3, input_size, input_size, dtype=torch.uint8)
        return imgs, torch.full((batch_size, classes), 1 / classes), []


def reset_head(model: nn.Module, std: float) -> None:
    """Truncated-normal weights with this std and zero bias, as in the official scripts."""
    trunc_normal_(model.head.weight, std=std)
    nn.init.zeros_(model.head.bias)


def freeze_backbone(model: nn.Module) -> None:
    """Train the head only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))


def layer_rates(model: nn.Module, decay: float, grouped: bool) -> Callable[[str], float]:
    """Learning-rate scale by parameter name: layer-wise decay, smallest near the input."""
    return layer_decay_scale(model.layer_numbers(grouped), decay)


class Evaluator:
    """Evaluates after every epoch and selects the best epoch on the split named `select`."""

    def __init__(
        self,
        tests: Mapping[str, TestSet],  # "test" and perhaps "val"
        select: str,
        by_ema: bool,
        normalise: Normalise,
        precision: Precision,
        flip: bool,
        between: Callable[[], None] = lambda: None,
        notes: Sequence[str] = (),
    ) -> None:
        """`by_ema`: also evaluate the EMA weights, and select the best epoch by them.

        `between` is called before each batch. `notes`: lines to print about what is left out of
        the tests.
        """
        self.tests, self.select, self.by_ema, self.notes = tests, select, by_ema, notes
        self.normalise, self.precision, self.flip = normalise, precision, flip
        self.between = between

    @property
    def weights(self) -> str:
        """The checkpoint entry of the weights that results refer to."""
        return "model_ema" if self.by_ema else "model"

    def evaluate(self, model: nn.Module, split: str) -> Evaluation:
        """Evaluate a model on one split."""
        test = self.tests[split]
        return evaluate_model(
            model,
            test,
            normalise=self.normalise,
            precision=self.precision,
            flip=self.flip,
            between=self.between,
        )

    def measure(self, state: TrainState) -> dict[str, float]:
        """An epoch's metrics for the log, which also update the best epoch.

        `{test,val}_{loss,acc1,uar,f1}`, with the suffix `_ema` for those of the EMA weights.
        """
        models = {"": state.model, **({"_ema": state.ema.module} if self.by_ema else {})}
        scores = {}
        for split in self.tests:
            for ending, model in models.items():
                result = self.evaluate(model, split).result
                scores |= {f"{split}_{s}{ending}": result[name] for s, name in LOGGED.items()}
        if self.tests:  # none with --disable_eval
            state.position.note(self._selecting(scores, "acc1"))
        return scores

    def line(self, scores: Mapping[str, float], position: Position, split: str) -> str:
        """`scores` of `measure` on what selects the best epoch, as the end of a log line.

        `split`: the data set's name of the selecting split.
        """
        accuracy, uar, loss = (self._selecting(scores, name) for name in ("acc1", "uar", "loss"))
        best = f"best so far: epoch {position.best_epoch}, {position.best:.2f} %"
        if position.best_epoch == position.epoch:
            best = "* best so far"
        return (
            f"{split}{' (EMA)' * self.by_ema}: "
            f"accuracy {accuracy:.2f} %  UAR {uar:.2f} %  loss {loss:.4f}  {best}"
        )

    def _selecting(self, scores: Mapping[str, float], name: str) -> float:
        """One of the metrics in LOGGED, of the split and the weights that select the best epoch."""
        return scores[f"{self.select}_{name}{'_ema' * self.by_ema}"]


def last_metrics(epoch: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """What `eval.json` records of the last epoch, beside the results of the best one."""
    return {"epoch": epoch, **{name: result[name] for name in OF_LAST}}


def write_results(
    output: Path, evaluation: Evaluation, test: TestSet, facts: Mapping[str, Any]
) -> None:
    """Write `eval.json`, `predictions.csv` and the charts of one evaluation."""
    left_out = {"images": dict(test.unknown), "answers": list(test.unasked)}
    result = {**evaluation.result, "left_out": left_out, **facts}
    write_json(output / "eval.json", result)
    readable = np.flatnonzero(evaluation.readable)
    names = [test.images.source.name(int(i)) for i in readable]
    labels, classes = test.common_labels[readable], test.common_classes
    p = evaluation.probabilities[readable]
    write_predictions(
        output / "predictions.csv", names, labels=labels, probabilities=p, classes=classes
    )
    for name, picture in result_figures(evaluation, test).items():
        save_png(picture, output / "figures" / f"{name}.png")


def result_figures(evaluation: Evaluation, test: TestSet) -> dict[str, np.ndarray]:
    """The charts of one evaluation by file name without suffix, (h, w, 3) uint8 each."""
    result, p = evaluation.result, evaluation.probabilities[evaluation.readable]
    right = p.argmax(axis=1) == test.common_labels[evaluation.readable]
    title = f"accuracy {result['accuracy']:.2f} %, UAR {result['uar']:.2f} %"
    return {
        "confusion_matrix": confusion_figure(
            result["confusion_matrix"], test.common_classes, title
        ),
        "classes": class_figure(result),
        "reliability": reliability_figure(p.max(axis=1), right),
    }
