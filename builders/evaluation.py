"""`--eval`, `--knn`, and the test at the end of fine-tuning: results of a classifier."""

import argparse

from builders import finetune as build
from builders import labelled_data as labelled
from builders import weights as checkpoint
from builders.labelled_data import FinetuneData
from engine_finetune import Evaluator, last_metrics, write_results
from engine_train import TrainState
from inference.examples import write_examples
from training.evaluate import doubt_order, judge
from training.precision import Precision
from training.probe import Probe, knn
from training.run import Run
from util.checkpoint.read import read_checkpoint
from util.distributed import on_main
from util.metrics import summary_lines
from util.options.evaluation import made_by
from util.options.parser import Options
from util.options.trained import difference_lines, differences
from util.rundir import BEST
from util.weights import load_pretrained


def evaluate(args: Options, run: Run) -> None:
    """`--eval`: test a fine-tuned checkpoint as it was trained; print and write the results."""
    saved, source = checkpoint.read_finetune(args), args.finetune
    args, trained, known, notes = checkpoint.use_as_trained(args, saved)
    data = labelled.open_data(args, trained, learns=False)
    classes, told = checkpoint.classes_of_checkpoint(args, known, data.test_set)
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
    evaluator = build.build_evaluator(
        args, run, data=data, classes=classes, precision=precision, between=run.stop.end_if_asked
    )
    differ = differences(args, trained, data.test_set.options)
    differ |= checkpoint.other_outputs(args, saved, known)
    report = labelled.report(data) if run.folder else []
    notes += [*told, *difference_lines(differ), *evaluator.notes, str(loaded)]
    print_lines(run, [*report, *notes])
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
    test = evaluator.tests["test"]
    write_results(run.output, evaluation, test, {**facts, **doubt.facts})
    write_examples(run.output, evaluation, test, normalise=evaluator.normalise, model=model)
    print_lines(run, [*summary_lines(evaluation.result), *doubt.lines, f"results: {run.output}"])


def classify_by_neighbours(args: Options, run: Run) -> None:
    """`--knn`: test images by the training images nearest to them in a backbone's features."""
    saved = checkpoint.read_finetune(args)
    args, trained, _, notes = checkpoint.use_as_trained(args, saved)
    data = labelled.open_data(args, trained)
    classes = data.train_set.classes
    model = build.build_model(args, len(classes))
    notes += checkpoint.start_from_pretrained(args, model, saved)
    precision = Precision(args.amp, run.device)
    evaluator = build.build_evaluator(
        args, run, data=data, classes=classes, precision=precision, between=run.stop.end_if_asked
    )
    split = "test" if "test" in data.tests else "val"
    test = evaluator.tests[split]
    view = build.evaluation_view(args)
    probe = Probe(
        data.train,
        test.images,
        classes=classes,
        view=view,
        normalise=evaluator.normalise,
        process=run.process,
        **build.loading(args, run),
    )
    differ = differences(args, trained, data.test_set.options)
    report = labelled.report(data) if run.folder else []
    print_lines(run, [*report, *notes, *difference_lines(differ), *evaluator.notes])
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
    write_examples(run.output, evaluation, test, normalise=evaluator.normalise)
    learnt = train.lines(len(data.train))
    print_lines(run, [*learnt, *summary_lines(evaluation.result), f"results: {run.output}"])


def test_chosen(
    args: argparse.Namespace,
    run: Run,
    data: FinetuneData,
    evaluator: Evaluator,
    state: TrainState,
    report: list[str],
    taught: dict[str, str],
) -> list[str]:
    """Evaluate the best and the last epoch; write what `--eval` writes; -> log lines."""
    split = "test" if "test" in data.tests else "val"
    model = state.ema.module if args.model_ema_eval else state.model
    best = last = evaluator.evaluate(model, split)
    epoch = last_epoch = state.position.epoch - 1
    if on_main(lambda: (run.output / BEST).exists()) and state.position.best_epoch != last_epoch:
        saved = read_checkpoint(run.output / BEST)
        model.load_state_dict(saved[saved["evaluated"]])
        best, epoch = evaluator.evaluate(model, split), saved["epoch"]
    facts = {
        **labelled.about(args, data, split, report),
        "made_by": made_by(args),
        "train_data": data.train_set.title,
        "train_images": len(data.train),
        "epoch": epoch,
        "selected_on": data.splits[args.select],
        "weights": evaluator.weights,
        **taught,
        "last": last_metrics(last_epoch, last.result),
    }
    label_order = data.owner(split).options.get("label_order")
    doubt = doubt_order(best, data.train_set.classes, label_order)
    if run.folder:
        test = evaluator.tests[split]
        write_results(run.output, best, test, {**facts, **doubt.facts})
        write_examples(run.output, best, test, normalise=evaluator.normalise, model=model)
    lost = [f"warning: epoch {state.position.best_epoch} was better; its weights are not here"]
    return [
        *(lost if epoch != state.position.best_epoch else []),
        f"best epoch on {data.splits[args.select]}: {epoch}; its results on {data.splits[split]}:",
        *summary_lines(best.result),
        *doubt.lines,
        f"last epoch, {last_epoch}: accuracy {last.result['accuracy']:.2f} %, "
        f"UAR {last.result['uar']:.2f} %",
    ]


def print_lines(run: Run, lines: list[str]) -> None:
    """Print lines, on rank 0."""
    if run.folder:
        print(*lines, sep="\n", flush=True)
