"""Fine-tuning of a pre-trained ViT, ConvNeXt V2 or ResNet on labelled faces, and evaluation.

    python main_finetune.py --model vit_base_patch16 --finetune PRE-TRAINED --data_path RAF-DB
    python main_finetune.py --eval --finetune FINE-TUNED --data_path RAF-DB --output_dir …

A run starts from the newest good checkpoint of --output_dir, else from --resume, else from
--finetune, else from scratch.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from util.errors import BadInput
from util.evaluation_dir import is_training, set_aside
from util.options.finetune import build_parser, check_options
from util.options.parser import Options, launch, resume_options, saving
from util.options.trained import difference_lines, differences
from util.program import run_program
from util.schedule import lr_at, scaled_lr, step_lr_at

if TYPE_CHECKING:
    from training.run import Run


def work(args: argparse.Namespace) -> None:
    """Fine-tune or evaluate in the run's folder, together with the other processes."""
    from builders.evaluation import classify_by_neighbours, evaluate
    from training.run import run_in_folder

    job = evaluate if args.eval else classify_by_neighbours if args.knn else finetune
    run_in_folder(args.output_dir, launch(args), lambda run: job(args, run))


def finetune(args: Options, run: "Run") -> None:
    """Build the parts, restore the state if the run resumes, train, and test the best epoch."""
    import torch

    from builders import finetune as build
    from builders import labelled_data as labelled
    from builders import weights as checkpoint
    from builders.evaluation import test_chosen
    from datasets import FinetuneDataset, build_loader
    from engine_train import Trainer
    from training.bad_images import BadImages
    from training.precision import Precision
    from training.resume import find_beginning, restore_state
    from training.run import (
        gradients_of,
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
        raise BadInput(f"--resume {weights}: only weights; start from them with --finetune")
    args, saved, trained, told = checkpoint.start_like_pretraining(args, path)
    data = labelled.open_data(args, trained)
    report = labelled.report(data) if run.folder else []
    args = labelled.with_data_options(args, data)
    now, before = ("from here", "until now") if path else ("fine-tuned", "pre-trained")
    differ = differences(args, trained, data.train_set.options)
    told += difference_lines(differ, now, before)
    classes, train = data.train_set.classes, data.train
    sampler = build.build_sampler(args, run, data)
    model = build.build_model(args, len(classes))
    if args.finetune and path is None:
        notes += checkpoint.start_from_pretrained(args, model, saved)
    del saved  # its memory
    build.prepare_head(args, model)
    model.to(run.device)
    # After the student, so that its head begins the same without a teacher.
    teacher = build.build_teacher(args, run, data.train_set)
    lr = args.lr if args.lr is not None else scaled_lr(args.blr, sampler.global_batch)
    precision = Precision(args.amp, run.device)
    state = build.build_state(args, model, lr, precision.scaler)
    identity = build.run_identity(
        args, data, sampler=sampler, lr=lr, precision=precision, teacher=teacher
    )
    notes += restore_state(
        path, resume_options(args), state=state, identity=identity, sampler=sampler
    )

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
    bad_images = BadImages(
        loss, len(train), record=run.output / "bad_images.txt", fresh=path is None, log=log
    )
    extra = {"run": identity, **build.checkpoint_extras(args, data.train_set)}
    observer = observe(
        run,
        log,
        state=state,
        sampler=sampler,
        epochs=args.epochs,
        saving=saving(args),
        at_lines=bad_images.tell,
        extra=extra,
    )
    trainer = Trainer(
        state,
        gradients_of(
            model,
            loss,
            precision,
            run,
            compiled=args.compile,
            graphed=args.cuda_graph,
            tell=log.line,
        ),
        lr_at=learning_rate(args, lr, sampler.steps),
        precision=precision,
        process=run.process,
        stop=run.stop,
        accum=args.accum_iter,
        clip_grad=args.clip_grad,
        seed=args.seed,
        weight_decay_at=weight_decay(args),
    )
    trainer.fix_bucket_order(loss.blank_batch(args.batch_size, args.input_size, len(classes)))
    evaluator = build.build_evaluator(
        args,
        run,
        data=data,
        classes=classes,
        precision=precision,
        between=lambda: trainer.save_if_overdue(observer),
    )
    for line in evaluator.notes:
        log.line(line)
    dataset = FinetuneDataset(train, len(classes), build.build_augment(args), args.seed)
    loader = build_loader(dataset, sampler, **build.loading(args, run))

    def measure(epoch: int) -> dict[str, float]:
        scores = evaluator.measure(state)
        if data.tests:
            told = evaluator.line(scores, state.position, data.splits[args.select])
            log.line(f"epoch {epoch}/{args.epochs}  {told}")
        return scores

    run_epochs(
        trainer,
        observer,
        sampler=sampler,
        loader=loader,
        measure=measure,
    )
    if data.tests:
        taught = build.learnt_from(args, data, teacher)
        for line in test_chosen(
            args, run, data=data, evaluator=evaluator, state=state, report=report, taught=taught
        ):
            log.line(line)
    log.close()


def learning_rate(args: argparse.Namespace, peak: float, steps: int) -> Callable[[float], float]:
    """The learning rate at a fractional epoch of `steps` steps."""
    warmup = args.warmup_steps / steps if args.warmup_steps > 0 else args.warmup_epochs
    if args.schedule == "step":
        return lambda epoch: step_lr_at(
            epoch, peak, warmup=warmup, falls=args.step_epochs, factor=args.step_factor
        )
    return lambda epoch: lr_at(epoch, peak, floor=args.min_lr, warmup=warmup, epochs=args.epochs)


def weight_decay(args: argparse.Namespace) -> Callable[[float], float] | None:
    """The weight decay at a fractional epoch; None if it is constant."""
    if args.weight_decay_end is None:
        return None
    return lambda epoch: lr_at(
        epoch, args.weight_decay, floor=args.weight_decay_end, warmup=0, epochs=args.epochs
    )


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
