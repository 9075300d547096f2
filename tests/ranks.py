"""Run a function on several gloo ranks and collect what each returns."""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _load(file: str, name: str) -> Callable:
    """A function of a test file.

    pytest's importlib mode gives such files no name a new process could import.
    """
    spec = importlib.util.spec_from_file_location("rank_functions", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _worker(rank: int, world: int, folder: str, file: str, name: str, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    result = _load(file, name)(rank, world, *args)
    torch.save(result, Path(folder) / f"{rank}.pt")
    with suppress(RuntimeError):  # the other rank may have left first
        dist.barrier()
    # Not by way of gloo's teardown: with FSDP2 it aborts now and then (a thread left joinable).
    os._exit(0)


def run(world: int, fn: Callable, *args: Any) -> list[Any]:
    """`fn(rank, world, *args)` on `world` processes; `fn` is at the top level of its file.

    None for a rank that left with os._exit(0).
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(
            _worker,
            (world, folder, fn.__code__.co_filename, fn.__name__, args),
            nprocs=world,
            join=True,
        )
        files = [Path(folder) / f"{r}.pt" for r in range(world)]
        return [torch.load(file) if file.exists() else None for file in files]
