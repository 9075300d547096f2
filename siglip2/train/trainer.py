"""The loop: data, step, log, checkpoint; then evaluate, export and report."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..config import Config
from ..data.loader import TrainLoader, merge_states
from ..data.sources import open_source
from ..distributed import check_same, wait_for_all
from ..errors import ConfigError
from . import checkpoint, setup
from .checkpoint import Progress
from .clock import Clock
from .finish import evaluate_run, finish
from .lost_ranks import lost_ranks_in_one_line
from .metrics import JsonLines, Reporter, console_line
from .metrics import Progress as Bar
from .optim import adamw
from .parallel import (
    init_distributed,
    on_every_rank,
    rank,
    unwrapped,
    whole_decoder,
    whole_model,
    world_size,
    wrap,
)
from .run_dir import check_one_config, flatten, open_run, record, to_yaml
from .ssl_stage import CollapseNotice, begin_stage, begins_at, describe_stage, view_seed
from .step import TrainStep

EVALUATION_TIMEOUT_S = 24 * 3600


class Run:
    """One training run: everything `loop` touches.

    Built from a config and, if there is one, a checkpoint.
    """

    def __init__(self, config: Config):
        setup.check(config)
        self.config = config
        self.device = init_distributed(timeout_s=config.dist.timeout_s)
        check_one_config(on_every_rank(to_yaml(config)))
        torch.manual_seed(config.train.seed)
        self.dir = Path(config.train.output_dir)
        resume_from = self._open()

        source = open_source(config.data.train, config.data)
        self.tokenizer = setup.build_tokenizer(config, source)
        model = setup.build_model(config, self.tokenizer.vocab_size, self.device)
        model.set_grad_checkpointing(config.model.grad_checkpointing)
        if config.train.compile:
            # DDP's graph splitter breaks with recomputed blocks and with lengths that vary.
            torch._dynamo.config.optimize_ddp = False
            model.vision.compile()
            model.text.compile()
        self.transform = setup.build_transform(model, config.data)
        self.loader = TrainLoader(
            source,
            self.transform,
            self.tokenizer,
            batch_size=config.train.batch_size,
            captions_per_image=config.data.captions_per_image,
            seed=config.train.seed,
            rank=rank(),
            world_size=world_size(),
            workers=config.data.workers,
            shuffle_buffer=config.data.shuffle_buffer,
            cache_images=config.data.cache_images,
            keep_groups=config.data.keep_groups,
            random_shift=config.data.random_shift,
            budgets=setup.build_budgets(config, world_size=world_size()),
            write_texts=setup.build_text_draws(config, self.tokenizer),
        )
        task = setup.build_task(model, config)
        if task.locca is not None:
            task.locca.decoder.grad_checkpointing = config.model.grad_checkpointing
            if config.train.compile:
                task.locca.decoder.compile()
        self.task = wrap(task, config.dist.strategy)
        self.step = TrainStep(
            self.task,
            adamw(self.task, config.optim),
            schedule=setup.build_schedule(config),
            grad_clip_norm=config.optim.grad_clip_norm,
            accum_steps=config.train.accum_steps,
            on_nonfinite=config.train.on_nonfinite,
            debug_dir=self.dir / "debug",
        )
        self.examples_a_step = config.train.batch_size * world_size()
        self.num_steps = math.ceil(config.train.examples / self.examples_a_step)
        self.stage_begins_at = begins_at(config)
        self.progress = Progress(step=0, examples=0, loader={}, time_s=0.0)
        if resume_from is not None:
            self._resume(resume_from)

    @property
    def model(self) -> torch.nn.Module:
        return unwrapped(self.task).model

    @property
    def stage_is_due(self) -> bool:
        has_begun = unwrapped(self.task).ssl is not None
        return not has_begun and self.progress.examples >= self.stage_begins_at

    def begin_stage(self) -> None:
        """Self-distillation and masked prediction, from the next step on."""
        self.task = begin_stage(self.task, self.step.optimizer, self.config)
        self.step.task = self.task

    def save(self) -> None:
        self.step.check()
        loader = merge_states(on_every_rank(self.progress.loader))
        checkpoint.save(
            self.dir / "checkpoints",
            unwrapped(self.task),
            self.step.optimizer,
            self.progress._replace(loader=loader, has_stage=unwrapped(self.task).ssl is not None),
            keep=self.config.train.keep_checkpoints,
        )

    def _open(self) -> Path | None:
        """Rank 0 readies the folder; the others are told where to resume, or what was wrong."""
        outcome: list[Any] = [None]
        if rank() == 0:
            try:
                outcome = [open_run(self.config, ranks=world_size())]
                record(self.config, ranks=world_size())
            except Exception as error:
                outcome = [error]
        if world_size() > 1:
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _resume(self, path: Path) -> None:
        if checkpoint.read_progress(path).has_stage and self.stage_begins_at < math.inf:
            self.begin_stage()
        self.progress = checkpoint.load(path, unwrapped(self.task), self.step.optimizer)
        self.step.num_steps = self.progress.step
        self.loader.load_state_dict(self.progress.loader)
        # From the examples left: the steps so far may have had another global batch.
        left = self.config.train.examples - self.progress.examples
        self.num_steps = self.progress.step + max(math.ceil(left / self.examples_a_step), 0)


def train(config: Config) -> Path:
    """Train, evaluate, export and report; return the run's folder.

    Start it under torchrun for several devices.  A run that was stopped goes on where its last
    checkpoint was.
    """
    with lost_ranks_in_one_line():
        run = Run(config)
        if rank() == 0:
            _banner(run)
        loop(run)
        run.save()
        model, decoder = whole_model(run.task), whole_decoder(run.task)
        if dist.is_initialized():  # nobody waits while rank 0 evaluates
            dist.destroy_process_group()
    if model is not None:
        finish(run, model, decoder)
    return run.dir


def loop(run: Run) -> None:
    """Step until the examples are spent."""
    train_config = run.config.train
    main = rank() == 0
    writer = JsonLines(run.dir / "metrics.jsonl", from_step=run.progress.step) if main else None
    reporter = Reporter(
        train_config.report_to if main else (), run.dir, flatten(dataclasses.asdict(run.config))
    )
    bar = Bar(run.num_steps, run.progress.step, enabled=main)
    batches = iter(run.loader)
    clock, collapse = Clock(run.progress.time_s), CollapseNotice()
    try:
        while run.progress.step < run.num_steps:
            with clock.waiting_for_data():
                batch = next(batches)
            if clock.num_steps == 0:
                _check_texts(run, batch["text"])
            if run.stage_is_due:
                run.begin_stage()
                bar.line(describe_stage(run.task, run.progress.step))
            seed = view_seed(train_config.seed, rank(), run.progress.step)
            metrics = run.step({**batch, "view_seed": seed}, examples=run.progress.examples)
            done = run.progress.step + 1
            run.progress = Progress(
                step=done,
                examples=run.progress.examples + run.examples_a_step,
                loader=run.loader.state_dict(),
                time_s=clock.total_s(),
            )
            clock.num_steps += 1
            bar.advance()
            if done % train_config.log_every_steps == 0 or done == run.num_steps:
                row = _row(run, metrics, clock)
                if main:
                    writer.write(row)
                    reporter.write(row)
                    bar.line(console_line(row, run.num_steps, clock.eta_s(run.num_steps - done)))
                    for line in collapse(row):
                        bar.line(line)
                clock.lap()
            if done % train_config.checkpoint_every_steps == 0 and done < run.num_steps:
                run.save()
            every = train_config.eval_every_steps
            if every and done % every == 0 and done < run.num_steps:
                model, decoder = whole_model(run.task), whole_decoder(run.task)
                if model is not None:
                    row = {"step": done, **evaluate_run(run, model, decoder).metrics()}
                    writer.write(row)
                    reporter.write(row)
                if world_size() > 1:  # no collective: dist.timeout_s is no limit here
                    wait_for_all("the end of an evaluation", EVALUATION_TIMEOUT_S)
    finally:
        bar.close()
        reporter.close()
        if writer:
            writer.close()


def _check_texts(run: Run, text: torch.Tensor) -> None:
    """Raises ConfigError on every rank when their texts differ in length or dtype."""
    if run.config.dist.check_shapes and world_size() > 1:
        try:
            check_same("text (L,)", tuple(text.shape[1:]), text.dtype, run.device)
        except ValueError as error:
            raise ConfigError(f"{error}. Their data or tokenizers differ") from None


def _row(run: Run, metrics: dict[str, torch.Tensor], clock: Clock) -> dict[str, Any]:
    """Every metric of this step; the only place that waits for the device.

    Losses are means over ranks.
    """
    values = {f"train/{name}": value.detach().float() for name, value in metrics.items()}
    if world_size() > 1:
        for name, value in values.items():
            if name.endswith("loss"):
                dist.all_reduce(value)
                value /= world_size()
    row: dict[str, Any] = {
        "step": run.progress.step,
        "examples": run.progress.examples,
        **{name: float(value) for name, value in values.items()},
        "perf/samples_per_second": run.examples_a_step / clock.step_s(),
        "perf/samples_per_second_per_gpu": run.config.train.batch_size / clock.step_s(),
        "perf/step_time_s": clock.step_s(),
        "perf/data_time_pct": clock.data_pct(),
        "time_s": run.progress.time_s,
    }
    row |= run.loader.packing()
    if run.device.type == "cuda":
        stats = torch.cuda.memory_stats()
        row["mem/max_reserved_gib"] = stats["reserved_bytes.all.peak"] / 2**30
        row["mem/num_alloc_retries"] = stats["num_alloc_retries"]
    skipped = {f"data/skipped/{reason}": n for reason, n in run.loader.report().items()}
    return row | skipped


def _banner(run: Run) -> None:
    """What is about to run, and on what."""
    from siglip2_kernels.report import report

    config, device = run.config, run.device
    params = sum(p.numel() for p in run.task.parameters() if p.requires_grad)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{config.model.name}: {params / 1e6:.1f} M parameters,"
        f" {config.train.precision} activations, on"
        f" {world_size()} x {name} ({torch.get_num_threads()} threads)"
    )
    print(
        f"data {config.data.train}, vocabulary {run.tokenizer.vocab_size:,};"
        f" batch {config.train.batch_size} x {world_size()} images, {run.num_steps:,} steps"
        f" = {run.num_steps * run.examples_a_step:,} images seen"
    )
    names = Counter[str]()
    for choice in report(device):
        names[choice.backend] += 1
    backends = ", ".join(f"{name} ({count})" for name, count in names.items())
    print(f"backends of {names.total()} fused operations: {backends}; siglip2 env says why")
    if run.progress.step:
        print(f"continuing {run.dir} after step {run.progress.step:,}")
    print(flush=True)
