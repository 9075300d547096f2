"""Lists of tensors as one kernel sees them: addresses and chunks in tables on the device.

Nothing here waits for the device or copies from the host: values travel as arguments of torch's
foreach kernels, so tables can also be built while a CUDA graph is captured.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def int_table(values: Sequence[int], device: torch.device) -> Tensor:
    """(len(values),) int64."""
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    if values:
        torch._foreach_add_(table.unbind(), list(values))
    return table


def chunk_table(sizes: Sequence[int], chunk: int, device: torch.device) -> Tensor:
    """(chunks of all tensors, 2) int32: which tensor, which of its chunks.

    Args:
        sizes: Elements of each tensor.
        chunk: Elements of a chunk; a tensor's last one may hold fewer.
    """
    counts = [-(-size // chunk) for size in sizes]
    total, starts, start = sum(counts), [], 0
    for count in counts:
        starts.append(start)
        start += count
    tensor = torch.repeat_interleave(int_table(counts, device), output_size=total)
    number = torch.arange(total, device=device) - int_table(starts, device)[tensor]
    return torch.stack((tensor, number), dim=1).int()


def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Of each tensor's first element; 0 where there is none."""
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
