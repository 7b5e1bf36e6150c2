"""The launch of csrc/merge.cu: all weights of a group in one kernel, and their statistics in a second, short one."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from cobra_kernels import cuda_extension

FIELDS = 14  # of a site, csrc/merge_site.h


def to_device(values: Sequence, device: torch.device) -> Tensor:
    """Integers on the device, without a wait for it."""
    table = torch.tensor(values, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def launch(
    library: ctypes.CDLL, fields: Sequence[int], shapes: Sequence[tuple[int, int]], device: torch.device, statistics: bool
) -> Tensor | None:
    """Writes the merged weights, on torch's current stream where the device has one.

    fields: of each site, FIELDS in turn; what they point to must outlive the launch on that stream
    shapes: (rows, columns) of each site, as in fields

    Returns the (sites, 3) sums of squares on the device, fp64, or None.
    """
    tiles = [library.cobra_cuda_merge_tiles(*shape) for shape in shapes]
    first_tile = list(accumulate(tiles, initial=0))
    table = to_device([*fields, *first_tile], device)
    tile_sums = torch.empty(sum(tiles), 3, dtype=torch.float64, device=device) if statistics else None
    sums = torch.empty(len(shapes), 3, dtype=torch.float64, device=device) if statistics else None
    pointers = [None if t is None else t.data_ptr() for t in (tile_sums, sums)]
    stream = cuda_extension.stream_of(table)
    first_tile_pointer = table[FIELDS * len(shapes) :].data_ptr()
    with torch.cuda.device_of(table):
        error = library.cobra_cuda_merge(table.data_ptr(), first_tile_pointer, len(shapes), sum(tiles), *pointers, stream)
    cuda_extension.check(error, "cobra_cuda_merge")
    return sums
