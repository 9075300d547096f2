"""The line a rank prints when another is gone, and the errors that stay what they are."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from siglip2.distributed import RankLostError
from siglip2.errors import CheckpointError
from siglip2.train import lost_ranks
from siglip2.train.lost_ranks import RunStoppedError, lost_ranks_in_one_line

GLOO = (
    "[/a/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:19: Connection reset by peer."
    " This is typically caused by a remote worker\nframe 1\nframe 2"
)


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(lost_ranks, "world_size", lambda: 2)
    monkeypatch.setattr(lost_ranks, "rank", lambda: 1)


def chained(outer, inner):
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(GLOO), r"\(Read error \[127.0.0.1\]:19: Connection reset by peer\)$"),
        (
            chained(CheckpointError("could not write"), RuntimeError(GLOO)),
            r"\(Read error \[127.0.0.1\]:19: Connection reset by peer\)$",
        ),
        (
            chained(RankLostError("rank 1 lost another while it waited. Look"), RuntimeError(GLOO)),
            r"\(rank 1 lost another while it waited\)$",
        ),
        (dist.DistBackendError("NCCL communicator was aborted"), r"\(NCCL communicator was abort"),
    ],
    ids=["gloo", "checkpoint", "loss", "nccl"],
)
@pytest.mark.usefixtures("two_ranks")
def test_a_lost_peer_is_one_line_that_says_what_to_do(error, reason):
    with pytest.raises(RunStoppedError, match=reason) as error_info, lost_ranks_in_one_line():
        raise error
    message = str(error_info.value)
    assert message.startswith("rank 1: another rank ended or is stuck")
    assert "Start the same command again" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("could not write: No space left on device"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
)
@pytest.mark.usefixtures("two_ranks")
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as error_info, lost_ranks_in_one_line():
        raise error
    assert error_info.value is error


def test_one_process_loses_no_rank():
    with pytest.raises(RuntimeError, match="Connection reset"), lost_ranks_in_one_line():
        raise RuntimeError(GLOO)


def test_torchruns_sigterm_is_one_line_too(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStoppedError, match="rank 0: stopped by SIGTERM, which torchrun sends"):
        with lost_ranks_in_one_line():
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
