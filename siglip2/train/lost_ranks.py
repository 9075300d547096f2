"""What a rank says when another one is gone: one line, not a transport's traceback."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

from ..distributed import RankLostError
from ..errors import CheckpointError, Siglip2Error
from .parallel import rank, world_size

# gloo raises plain RuntimeErrors; NCCL and the rendezvous store have classes of their own.
_GLOO = ("gloo", "closed by peer", "reset by peer", "Broken pipe", "Timed out waiting")
_AGAIN = "Start the same command again: it goes on from the last checkpoint"


class RunStoppedError(Siglip2Error, RuntimeError):
    """The run cannot go on because another process ended or never arrived."""


class _Terminated(Exception):
    """SIGTERM: how torchrun ends the ranks that are left."""


@contextmanager
def lost_ranks_in_one_line() -> Iterator[None]:
    """Turns the error of a collective whose peer is gone into RunStoppedError."""
    watch = "RANK" in os.environ and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if watch else None
    try:
        yield
    except _Terminated:
        raise RunStoppedError(
            f"rank {rank()}: stopped by SIGTERM, which torchrun sends when another rank has ended."
            f" {_AGAIN}"
        ) from None
    except (RuntimeError, CheckpointError) as error:
        reason = _transport_fault(error) if world_size() > 1 else None
        if reason is None:
            raise
        raise RunStoppedError(
            f"rank {rank()}: another rank ended or is stuck; torchrun names the first that failed."
            f" {_AGAIN} ({reason})"
        ) from error
    finally:
        if watch:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _transport_fault(error: BaseException | None) -> str | None:
    """What the transport said, wherever in the chain of causes; None: of no transport."""
    found = None
    while error is not None:
        text = next(iter(str(error).splitlines()), type(error).__name__)
        # gloo starts with a place in its source and ends with advice.
        reason = re.sub(r"^\[\S+\] ", "", text).split(". ")[0]
        if isinstance(error, RankLostError):
            return reason
        if isinstance(error, dist.DistError) or any(words in text for words in _GLOO):
            found = reason
        error = error.__cause__ or error.__context__
    return found
