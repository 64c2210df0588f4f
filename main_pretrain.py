"""Masked pre-training of a ViT (MAE), a ConvNeXt V2 (FCMAE) or a ResNet on images of faces.

    python main_pretrain.py                                    # synthetic faces, this machine
    torchrun --nproc_per_node=8 main_pretrain.py --model convnextv2_base --data_path … …

A run starts from the newest good checkpoint of --output_dir, else from --resume, else from scratch.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from util.options.parser import launch, resume_options, saving
from util.options.pretrain import build_parser, check_options
from util.options.trained import difference_lines, differences
from util.program import run_program
from util.schedule import lr_at, scaled_lr

if TYPE_CHECKING:
    from training.run import Run


def work(args: Namespace) -> None:
    """Pre-train in the run's folder, together with the other processes."""
    from training.run import run_in_folder

    run_in_folder(args.output_dir, launch(args), lambda run: pretrain(args, run))


def pretrain(args: Namespace, run: "Run") -> None:
    """Build the parts, restore the state if the run resumes, train the remaining epochs."""
    # Only now: --help and wrong options should not have to wait for torch.
    import torch

    from builders import pretrain as build
    from datasets.transforms import Normalise
    from engine_pretrain import MaskedLoss, Resolution, start_from_weights
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
    model = build.build_model(args, run)
    size_at = build.size_schedule(args, model.patch_size)
    data = build.open_data(args, run, model.num_patches, size_at)
    sampler, margin = data.sampler, data.face_margin
    # The probe's data set may have face boxes even if these images are faces already.
    probe_margin = args.face_margin if margin is None else margin
    args = args.but(face_margin=margin)

    lr = args.lr if args.lr is not None else scaled_lr(args.blr, sampler.global_batch)
    precision = Precision(args.amp, run.device)
    state = build.build_state(args, model, lr, precision)
    identity = build.run_identity(args, data, lr, precision)
    path, weights, notes = find_beginning(run.output, resume_options(args))
    if weights:
        trained, told = start_from_weights(model, weights)
        seen = {name: trained[name] for name in ("input_size", "face_margin") if name in trained}
        differ = differences(args, seen, {"face_margin": margin})
        notes += [*told, *difference_lines(differ, now="continued", before="begun")]
    notes += restore_state(
        path, resume_options(args), state=state, identity=identity, sampler=sampler
    )

    log = open_log(run, args.log_dir, state, sampler.steps)
    write_config(
        run,
        {**vars(args), "face_margin": probe_margin},
        model={"name": args.model, "parameters": sum(p.numel() for p in model.parameters())},
        data={
            "path": args.data_path,
            "count": len(data.dataset),
            "digest": data.dataset.source.digest,
        },
        global_batch=sampler.global_batch,
        lr=lr,
    )
    for line in (
        *data.notes,
        build.describe_model(args, run, model, precision),
        step_line(sampler, args.data_path, lr),
        *warmup_lines(args.warmup_epochs, args.epochs),
        *notes,
    ):
        log.line(line)

    normalise = Normalise().to(run.device)
    loss = MaskedLoss(normalise)
    record = run.output / "bad_images.txt"
    bad_images = BadImages(loss, len(data.dataset), record=record, fresh=path is None, log=log)
    extra = {"args": vars(args), "run": identity, "preprocessing": build.preprocessing(args)}
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
        lr_at=lambda epoch: lr_at(
            epoch, lr, floor=args.min_lr, warmup=args.warmup_epochs, epochs=args.epochs
        ),
        precision=precision,
        process=run.process,
        stop=run.stop,
        accum=args.accum_iter,
        clip_grad=args.clip_grad,
        seed=args.seed,
    )
    trainer.fix_bucket_order(loss.blank_batch(args.batch_size, args.input_size, model.num_patches))
    pictures = build.build_pictures(args, run, data, normalise)
    probe = build.build_probe(args, run, normalise=normalise, face_margin=probe_margin, log=log)
    resolution = Resolution(model, size_at, log)

    def measure(epoch: int) -> dict[str, float]:
        measured = resolution.end(epoch)
        if pictures and pictures.due(epoch, args.epochs):
            pictures.save(model, epoch, log)
        if probe and ((epoch + 1) % args.probe_freq == 0 or epoch + 1 == args.epochs):
            measured |= probe.measure(model, precision, lambda: trainer.save_if_overdue(observer))
        return measured

    run_epochs(
        trainer,
        observer,
        sampler=sampler,
        loader=data.loader,
        measure=measure,
        begin=resolution.begin,
    )
    log.close()


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
