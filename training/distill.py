"""Distillation: a trained classifier (teacher) teaches another (student) on its training images.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531).
Targets are soft and the student has one head: the distillation token and the hard labels of DeiT
(arXiv 2012.12877) are not used.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.labelled import digest_of
from datasets.labels import shared_classes
from datasets.transforms import Normalise
from models_saved import SavedClassifier
from training.recorded import described
from util.errors import BadInput
from util.wording import printable


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Logits (N, C) of both -> T² KL(softmax(teacher / T) || softmax(student / T)), mean over N.

    Softening divides gradients by T². The factor compensates for this, so that the temperature does
    not change the weight of the teacher (section 2). Computed in fp32, whatever the logits' type.
    """
    log_p = F.log_softmax(teacher.float() / temperature, dim=1)
    log_q = F.log_softmax(student.float() / temperature, dim=1)
    # DeiT's code also divides by C, which lowers the weight of the teacher.
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def match(
    source: str, known: Sequence[str], classes: Sequence[str], weight: float
) -> tuple[list[int], list[int], list[str]]:
    """Indices of the shared classes among the student's and the teacher's, and log lines on others.

    Raises BadInput if they share fewer than two classes, or if classes unknown to the teacher could
    only be learnt from labels of weight 0.
    """
    ours, theirs = shared_classes(classes, known)
    if len(ours) < 2:
        raise BadInput(
            f"{source}: its classes ({_listed(known)}) have fewer than two in common "
            f"with the data set's ({_listed(classes)})"
        )
    unasked = _listed(c for k, c in enumerate(known) if k not in theirs)
    unknown = _listed(c for k, c in enumerate(classes) if k not in ours)
    lines = []
    if unasked:
        lines.append(f"left out: the teacher's {unasked}, which the data set does not have")
    if unknown and weight == 1:
        raise BadInput(
            f"{source}: does not know {unknown}, which only the labels can teach, but they have no "
            "weight with --distill_weight 1; lower it"
        )
    if unknown:
        lines.append(
            f"the teacher does not know {unknown}: it teaches the other {len(ours)} classes"
        )
    return ours, theirs, lines


class Teacher:
    """Mixes a batch's loss with the distance between the student's and the teacher's predictions.

    Classes are matched by name. Both distributions are restricted to the shared classes, so that a
    class unknown to the teacher is learnt from the labels alone.
    """

    def __init__(
        self,
        source: str,
        saved: SavedClassifier,
        classes: Sequence[str],
        normalise: Normalise,
        weight: float,
        temperature: float,
    ) -> None:
        """`classes` and `normalise` are the student's; `weight` is the teacher's share of the loss.

        The teacher moves to the device of `normalise`. Raises BadInput if it cannot teach these
        classes.
        """
        ours, theirs, lines = match(source, saved.classes, classes, weight)
        share = f"weight {weight:g}, temperature {temperature:g}"
        self.description = described(saved)
        self.lines = [f"teacher {source}: {self.description}; {share}"]
        self.lines += [*(f"note: {note}" for note in saved.notes), *lines]
        self.weight, self.temperature = weight, temperature
        self.size, self.mode = saved.preprocessing.input_size, saved.preprocessing.interpolation
        seen, device = saved.preprocessing.normalise, normalise.mean.device
        # Covers only what determines predictions: the file may move or hold other things.
        self.digest = digest_of(
            *(saved.name, str(self.size), self.mode),
            *map(np.array, (ours, theirs)),
            *(value.numpy() for value in (seen.mean, seen.std, *saved.model.state_dict().values())),
        )[:16]
        self.ours, self.theirs = (torch.tensor(k, device=device) for k in (ours, theirs))
        self.model = saved.model.to(device).eval().requires_grad_(False)
        seen = seen.to(device)
        # Undo the student's normalisation and apply the teacher's, in one step.
        self.scale, self.shift = normalise.std / seen.std, (normalise.mean - seen.mean) / seen.std

    def __call__(self, x: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """The student's input (N, 3, S, S), logits (N, K) and loss on labels -> the mixed loss."""
        own = logits.index_select(1, self.ours)
        distance = distillation_loss(own, self.logits(x), self.temperature)
        return (1 - self.weight) * loss + self.weight * distance

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The student's input (N, 3, S, S) -> (N, C), the shared classes in the student's order.

        The teacher sees the student's view (augmented, erased and mixed), resized to its own input
        size.
        """
        x = x * self.scale + self.shift
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode=self.mode, antialias=True)
        return self.model(x).index_select(1, self.theirs)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))
