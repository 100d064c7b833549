"""`train(config)`: put a run together from its config, and start or resume it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from locfast import __version__
from locfast.config.base import TrainConfig
from locfast.config.files import default_out, to_dict
from locfast.config.registry import method_config
from locfast.data.loader import Loader, explain_dead_worker
from locfast.data.sources import open_source
from locfast.data.spec import Source
from locfast.engine import resume
from locfast.engine.distributed import World, environment, join
from locfast.engine.ema import Average
from locfast.engine.lock import Lock
from locfast.engine.logs import log, logging_to
from locfast.engine.loop import Trainer
from locfast.engine.optim import build_optimizer
from locfast.engine.precision import DTYPES, autocast, make_deterministic, pick_device, pick_precision
from locfast.engine.progress import Display
from locfast.engine.run_folder import RunFolder
from locfast.engine.schedule import Plan
from locfast.engine.trackers import Jsonl, open_trackers, require
from locfast.engine.validate import Validation, split
from locfast.errors import UserError
from locfast.kernels import _backend
from locfast.methods import create_method
from locfast.methods.base import PREPARATION_EPOCH, Batch, Method


def train(config: TrainConfig) -> Path:
    """Train as `config` says (a class of `registry.run_config_class`), under torchrun or alone; gives the run folder.

    Raises:
        UserError: every mistake of a user, a run folder that is in use, a loss that is not finite.
    """
    world = environment()
    device = pick_device(config.device, world.local_rank, world.size)
    if config.deterministic:
        make_deterministic()
    folder = RunFolder(Path(config.out or default_out(config.method, config.model)))
    lock = Lock(folder.path)
    join(world, device)
    try:
        world.on_first(lambda: folder.check(resume=config.resume, overwrite=config.overwrite))
        source, held_out = split(open_source(config.data, seed=config.seed), config.val, config.seed)
        world.on_first(lambda: require(config.track))
        with _kernels(config.kernels):
            _train(config, world, device, folder, lock, source, held_out)
    except RuntimeError as error:
        raise explain_dead_worker(error) or error from None
    finally:
        lock.release()
        world.close()
    return folder.path


def check_kernels(config: TrainConfig) -> None:
    """Raise what `train` would for kernels and attention that cannot run here; for callers with work of their own."""
    device = pick_device(config.device)
    method = create_method(
        config.method, method_config(config), model=config.model, pretrained=False, image_size=config.image_size, seed=0
    )
    with _kernels(config.kernels):
        method.check(device, DTYPES[pick_precision(config.precision, device)])


def resolve(config: TrainConfig, method: Method) -> TrainConfig:
    """`config` with the method's defaults where the user left a flag open."""
    defaults = method.defaults()
    values: dict[str, Any] = {}
    if config.batch_size is None:
        values["batch_size"] = int(defaults["batch_size"])
    if config.lr is None:
        values["lr"] = float(defaults["lr"])
    if config.epochs is None and config.steps is None:
        values["epochs"] = float(defaults["epochs"])
    return dataclasses.replace(config, **values)


def _train(
    config: TrainConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    lock: Lock,
    source: Source,
    held_out: Source | None,
) -> None:
    point = resume.find(config, folder, world)
    method = create_method(
        config.method,
        method_config(config),
        model=config.model,
        pretrained=config.pretrained and point.needs_pretrained,
        image_size=config.image_size,
        seed=config.seed,
    ).to(device)
    config = dataclasses.replace(resolve(config, method), shuffle=resume.shuffle(config, point, source))
    plan = Plan.of(
        len(source), config.batch_size or 0, config.micro_batch, world.size, world.rank, config.epochs, config.steps
    )
    identity = resume.identity(config, plan)
    resume.check_identity(point, identity, config, folder)
    precision = pick_precision(config.precision, device)
    method.check(device, DTYPES[precision])
    notes = method.notes(plan.micro_batch, plan.ranks, plan.accumulation)
    loading: dict[str, Any] = {"workers": config.workers, "decoder": config.decoder}
    loader = Loader(source, method.image_spec(), seed=config.seed, device=device, shuffle=config.shuffle, **loading)
    optimizer = build_optimizer(method, method.optim, config.lr or 0.0)
    if config.grad_checkpointing:
        method.enable_grad_checkpointing()

    # from here on the run folder is ours: all mistakes that can be seen before are told before anything is written
    world.on_first(lambda: folder.open(lock, resume=config.resume, overwrite=config.overwrite))
    world.on_first(lambda: folder.write_config(config))
    console = Console()
    with logging_to(folder.log, console, world.first):
        _say_what_runs(config, plan, device, precision, source, held_out)
        for note in notes:
            log.info("%s", note)
        if method.optim.warmup_epochs * plan.samples >= plan.steps * plan.batch:
            log.warning(
                "the warm-up of %g epochs is as long as the run of %.2f: the learning rate never falls, nor perhaps "
                "reaches %g. Set --%s.optim.warmup-epochs",
                *(method.optim.warmup_epochs, plan.epochs_done(plan.steps), config.lr, config.method),
            )
        log.info("decoder: %s", loader.decoding)
        log.info("order: %r", loader.order)
        log.info("optimiser: %s.%s", type(optimizer).__module__, type(optimizer).__name__)
        if point.checkpoint is None:
            _prepare(method, loader, plan, world, config.seed, precision)
        average = Average(method, config.ema) if config.ema is not None else None
        frozen = resume.restore(point, folder, world, method, optimizer, average, loader)
        if config.compile:
            method.enable_compile()
        validation = None
        if held_out is not None:
            settings = {"micro_batch": plan.micro_batch, "seed": config.seed, "precision": precision, **loading}
            validation = Validation(held_out, method, world, **settings)
        trackers = open_trackers(config.track, folder.path, to_dict(config), point.step) if world.first else []
        run = Trainer(
            config=config,
            optim=method.optim,
            method=method,
            optimizer=optimizer,
            loader=loader,
            source=source,
            plan=plan,
            world=world,
            precision=precision,
            folder=folder,
            display=Display(plan, console, world.first),
            jsonl=Jsonl(folder.metrics) if world.first else None,
            trackers=trackers,
            state={"format": 1, "locfast": __version__, "torch": torch.__version__, **identity, "frozen": frozen},
            average=average,
            validation=validation,
        )
        try:
            run.fit(point.step)
        finally:
            for tracker in (run.jsonl, *trackers):
                if tracker is not None:
                    tracker.close()
        if loader.on_cpu:
            kinds = ", ".join(f"{count} {kind}" for kind, count in loader.on_cpu.most_common())
            log.info("decoded on the CPU beside %s: %s", loader.decoder, kinds)
        log.info("done: %s", folder.path)


def _prepare(method: Method, loader: Loader, plan: Plan, world: World, seed: int, precision: str) -> None:
    """Show the method the samples that it wants to see before step 0: shuffled, with draws of their own."""
    count = min(method.preparation_samples, plan.samples)
    if not count:
        return
    log.info("looking at %d images before step 0", count)
    _, chosen = loader.order(PREPARATION_EPOCH * plan.samples + torch.arange(count))
    share = chosen.tensor_split(world.size)[world.rank]

    def batches() -> Iterator[tuple[Batch, Any]]:
        for batch in loader.sequential(PREPARATION_EPOCH, share.split(plan.micro_batch) if len(share) else []):
            yield batch, method.draw(method.keys(seed, batch))

    with torch.no_grad(), autocast(method.device, precision):
        method.prepare(batches(), world.sum)


def _say_what_runs(
    config: TrainConfig, plan: Plan, device: torch.device, precision: str, source: Source, held_out: Source | None
) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    log.info(
        "locfast %s: %s on %s, %s, %s, torch %s",
        __version__,
        config.method,
        config.model,
        name,
        precision,
        torch.__version__,
    )
    log.info(
        "%d images, %s held out; %d steps of %d images (%d ranks x %d rounds x %d), %.2f epochs",
        len(source),
        len(held_out) if held_out else "none",
        plan.steps,
        plan.batch,
        plan.ranks,
        plan.accumulation,
        plan.micro_batch,
        plan.epochs_done(plan.steps),
    )
    choices = _backend.describe(device, DTYPES[precision])
    log.info("kernels: %s", ", ".join(f"{op}={choice}" for op, choice in choices.items()))


@contextmanager
def _kernels(name: str) -> Iterator[None]:
    """Run the fused ops on the backend called `name`. UserError where it cannot run."""
    try:
        if name == "auto":
            yield
        else:
            with _backend.use_backend(name):
                yield
    except _backend.BackendError as error:
        raise UserError(str(error)) from error
