"""Fine-tuning of a pre-trained ViT or ConvNeXt V2 on labelled faces, and its evaluation.

    python main_finetune.py --model vit_base_patch16 --finetune PRE-TRAINED --data_path RAF-DB
    python main_finetune.py --eval --finetune FINE-TUNED --data_path RAF-DB --output_dir …

Start order: the newest good checkpoint of --output_dir, else --resume, else --finetune, else from
nothing.
"""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from util.errors import BadInput
from util.evaluation_dir import is_training, set_aside
from util.options.evaluation import made_by
from util.options.finetune import build_parser, check_options
from util.options.parser import Options, launch, resume_options, saving
from util.options.trained import difference_lines, differences
from util.program import run_program
from util.schedule import lr_at, scaled_lr, step_lr_at

if TYPE_CHECKING:
    from builders.labelled_data import Data
    from engine_finetune import Evaluator
    from engine_train import TrainState
    from training.run import Run


def work(args: argparse.Namespace) -> None:
    """Fine-tune or evaluate in the run's folder, with the other processes."""
    from training.run import run_in_folder

    job = evaluate if args.eval else classify_by_neighbours if args.knn else finetune
    run_in_folder(args.output_dir, launch(args), lambda run: job(args, run))


def finetune(args: Options, run: "Run") -> None:
    """Build the parts, go to where the run begins, run the epochs that are left, test the best."""
    import torch

    from builders import finetune as build
    from builders import labelled_data as labelled
    from builders import weights as checkpoint
    from datasets import FinetuneDataset, build_loader
    from engine_train import Precision, Trainer
    from training.bad_images import BadImages
    from training.resume import find_beginning, restore_state
    from training.run import (
        distribute,
        observe,
        open_log,
        run_epochs,
        step_line,
        warmup_lines,
        write_config,
    )

    torch.manual_seed(args.seed)
    if run.device.type == "mps" and args.grad_checkpointing and args.drop_path:
        raise BadInput(
            "--grad_checkpointing: on Apple GPUs torch would recompute other drop paths; set "
            "--drop_path 0, or leave it out"
        )
    path, weights, notes = find_beginning(run.output, resume_options(args))
    if weights:
        raise BadInput(f"--resume {weights}: weights alone; begin with them by --finetune")
    args, saved, trained, told = checkpoint.begin_like_pretraining(args, path)
    data = labelled.open_data(args, run, trained)
    report = labelled.report(data) if run.folder else []
    args = labelled.with_data_options(args, data)
    now, before = ("from here", "until now") if path else ("fine-tuned", "pre-trained")
    differ = differences(args, trained, data.train_set.options)
    told += difference_lines(differ, now, before)
    classes, train = data.train_set.classes, data.train
    sampler = build.build_sampler(args, run, data)
    model = build.build_model(args, len(classes))
    if args.finetune and path is None:
        notes += checkpoint.begin_with_pretrained(args, model, saved)
    del saved  # its memory
    build.prepare_head(args, model)
    model.to(run.device)
    # After the student, so that its head begins the same without a teacher.
    teacher = build.build_teacher(args, run, data.train_set)
    lr = args.lr if args.lr is not None else scaled_lr(args.blr, sampler.global_batch)
    precision = Precision(args.amp, run.device)
    state = build.build_state(args, model, lr, precision.scaler)
    identity = build.run_identity(args, data, sampler, lr, precision, teacher)
    notes += restore_state(path, resume_options(args), state, identity, sampler)

    log = open_log(run, args.log_dir, state, sampler.steps)
    parameters = sum(p.numel() for p in model.parameters())
    if run.folder and (path is None or not is_training(run.output)):
        notes += set_aside(run.output)
    write_config(
        run,
        labelled.config_options(args, data),
        model={"name": args.model, "parameters": parameters},
        data=labelled.describe_data(args, data),
        classes=classes,
        global_batch=sampler.global_batch,
        lr=lr,
    )
    sources = " and ".join(filter(None, (args.data_path, args.pseudo_labels)))
    drawn = ", all classes equally often" if build.balanced(args, data) else ""
    for line in (
        *report,
        build.describe_model(args, run, parameters, precision),
        *(teacher.lines if teacher else []),
        step_line(sampler, sources, lr) + drawn,
        *warmup_lines(args.warmup_epochs, args.epochs),
        *notes,
        *told,
    ):
        log.line(line)

    loss = build.build_loss(args, run, len(classes), teacher)
    bad_images = BadImages(loss, len(train), run.output / "bad_images.txt", path is None, log)
    extra = {"run": identity, **build.travels_along(args, data.train_set)}
    observer = observe(run, log, state, sampler, args.epochs, saving(args), bad_images.tell, extra)
    trainer = Trainer(
        state,
        distribute(model, run, args.compile),
        loss,
        lr_at=learning_rate(args, lr, sampler.steps),
        precision=precision,
        place=run.place,
        stop=run.stop,
        accum=args.accum_iter,
        clip_grad=args.clip_grad,
        seed=args.seed,
        weight_decay_at=weight_decay(args),
    )
    trainer.settle_buckets(loss.blank(args.batch_size, args.input_size, len(classes)))
    evaluator = build.build_evaluator(
        args, run, data, classes, precision, lambda: trainer.save_if_overdue(observer)
    )
    for line in evaluator.notes:
        log.line(line)
    dataset = FinetuneDataset(train, len(classes), build.build_augment(args), args.seed)
    loader = build_loader(dataset, sampler, **build.loading(args, run))
    run_epochs(trainer, observer, sampler, loader, lambda epoch: evaluator.measure(state))
    if data.tests:
        taught = build.learnt_from(args, data, teacher)
        for line in test_chosen(args, run, data, evaluator, state, report, taught):
            log.line(line)
    log.close()


def learning_rate(args: argparse.Namespace, peak: float, steps: int) -> Callable[[float], float]:
    """The rate at a fractional epoch of `steps` steps."""
    warmup = args.warmup_steps / steps if args.warmup_steps > 0 else args.warmup_epochs
    if args.schedule == "step":
        return lambda epoch: step_lr_at(epoch, peak, warmup, args.step_epochs, args.step_factor)
    return lambda epoch: lr_at(epoch, peak, args.min_lr, warmup, args.epochs)


def weight_decay(args: argparse.Namespace) -> Callable[[float], float] | None:
    """The weight decay at a fractional epoch, where it is to change."""
    if args.weight_decay_end is None:
        return None
    return lambda epoch: lr_at(epoch, args.weight_decay, args.weight_decay_end, 0, args.epochs)


def test_chosen(
    args: argparse.Namespace,
    run: "Run",
    data: "Data",
    evaluator: "Evaluator",
    state: "TrainState",
    report: list[str],
    taught: dict[str, str],
) -> list[str]:
    """Evaluate the best epoch beside the last; write what `--eval` writes; -> lines to say."""
    from builders.labelled_data import about
    from engine_finetune import write_results
    from training.evaluate import doubt_order
    from util.checkpoint import BEST, read_checkpoint
    from util.distributed import on_main
    from util.metrics import summary_lines

    split = "test" if "test" in data.tests else "val"
    model = state.ema.module if args.model_ema_eval else state.model
    best = last = evaluator.evaluate(model, split)
    epoch = last_epoch = state.position.epoch - 1
    if on_main(lambda: (run.output / BEST).exists()) and state.position.best_epoch != last_epoch:
        saved = read_checkpoint(run.output / BEST)
        model.load_state_dict(saved[saved["evaluated"]])
        best, epoch = evaluator.evaluate(model, split), saved["epoch"]
    facts = {
        **about(args, data, split, report),
        "made_by": made_by(args),
        "train_data": data.train_set.title,
        "train_images": len(data.train),
        "epoch": epoch,
        "selected_on": data.splits[args.select],
        "weights": evaluator.weights,
        **taught,
        "last": {
            "epoch": last_epoch,
            **{name: last.result[name] for name in ("accuracy", "uar", "macro_f1")},
        },
    }
    label_order = data.owner(split).options.get("label_order")
    doubt = doubt_order(best, data.train_set.classes, label_order)
    if run.folder:
        write_results(run.output, best, evaluator.tests[split], {**facts, **doubt.facts})
    lost = [f"warning: epoch {state.position.best_epoch} was better; its weights are not here"]
    return [
        *(lost if epoch != state.position.best_epoch else []),
        f"best epoch on {data.splits[args.select]}: {epoch}; its results on {data.splits[split]}:",
        *summary_lines(best.result),
        *doubt.lines,
        f"last epoch, {last_epoch}: accuracy {last.result['accuracy']:.2f} %, "
        f"UAR {last.result['uar']:.2f} %",
    ]


def evaluate(args: Options, run: "Run") -> None:
    """`--eval`: test a fine-tuned checkpoint as it was trained; print and write the results."""
    from builders import finetune as build
    from builders import labelled_data as labelled
    from builders import weights as checkpoint
    from engine_finetune import write_results
    from engine_train import Precision
    from training.evaluate import doubt_order
    from util.metrics import summary_lines
    from util.weights import load_pretrained

    saved, source = checkpoint.read_finetune(args), args.finetune
    args, trained, known, notes = checkpoint.use_as_trained(args, saved)
    data = labelled.open_data(args, run, trained, learns=False)
    classes, told = checkpoint.name_classes(args, known, data.test_set)
    model = build.build_model(args, len(classes))
    build.prepare_head(args, model)
    loaded = load_pretrained(
        model,
        source,
        key=checkpoint.weights_key(args, saved),
        prefix=args.model_prefix,
        keep_head=True,
        checkpoint=saved,
    )
    precision = Precision(args.amp, run.device)
    evaluator = build.build_evaluator(args, run, data, classes, precision, run.stop.end_if_asked)
    differ = differences(args, trained, data.test_set.options)
    differ |= checkpoint.other_outputs(args, saved, known)
    report = labelled.report(data) if run.folder else []
    notes += [*told, *difference_lines(differ), *evaluator.notes, str(loaded)]
    say(run, [*report, *notes])
    evaluation = evaluator.evaluate(model.to(run.device), "test")
    if not run.folder:
        return
    facts = {
        **labelled.about(args, data, "test", report),
        "made_by": made_by(args),
        "checkpoint": source,
        "weights": loaded.entry,
        "differs_from_training": differ,
    }
    if isinstance(saved.get("epoch"), int):
        facts["epoch"] = saved["epoch"]
    doubt = doubt_order(evaluation, classes, data.test_set.options.get("label_order"))
    write_results(run.output, evaluation, evaluator.tests["test"], {**facts, **doubt.facts})
    say(run, [*summary_lines(evaluation.result), *doubt.lines, f"results: {run.output}"])


def classify_by_neighbours(args: Options, run: "Run") -> None:
    """`--knn`: test images by the training images nearest to them in a backbone's features."""
    from builders import finetune as build
    from builders import labelled_data as labelled
    from builders import weights as checkpoint
    from engine_finetune import write_results
    from engine_train import Precision
    from training.evaluate import judge
    from training.probe import Probe, knn
    from util.metrics import summary_lines

    saved = checkpoint.read_finetune(args)
    args, trained, _, notes = checkpoint.use_as_trained(args, saved)
    data = labelled.open_data(args, run, trained)
    classes = data.train_set.classes
    model = build.build_model(args, len(classes))
    notes += checkpoint.begin_with_pretrained(args, model, saved)
    precision = Precision(args.amp, run.device)
    evaluator = build.build_evaluator(args, run, data, classes, precision, run.stop.end_if_asked)
    split = "test" if "test" in data.tests else "val"
    test = evaluator.tests[split]
    view = build.evaluation_view(args)
    probe = Probe(
        data.train,
        test.images,
        classes,
        view,
        evaluator.normalise,
        run.place,
        **build.loading(args, run),
    )
    differ = differences(args, trained, data.test_set.options)
    report = labelled.report(data) if run.folder else []
    say(run, [*report, *notes, *difference_lines(differ), *evaluator.notes])
    train, queries = probe.features(model.to(run.device), precision, run.stop.end_if_asked)
    if not run.folder:
        return
    evaluation = judge(knn(train, queries.x, len(classes)), queries.readable, test)
    facts = {
        **labelled.about(args, data, split, report),
        "made_by": made_by(args),
        "classifier": "nearest neighbours",
        "checkpoint": args.finetune,
        "differs_from_training": differ,
        **train.counts(),
    }
    write_results(run.output, evaluation, test, facts)
    learnt = train.lines(len(data.train))
    say(run, [*learnt, *summary_lines(evaluation.result), f"results: {run.output}"])


def say(run: "Run", lines: list[str]) -> None:
    """Print lines, on rank 0."""
    if run.folder:
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
