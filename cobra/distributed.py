"""Many processes, as torch.distributed starts them: results of all ranks in one order, errors of one rank on all of them, and
parameters of which a rank holds a part.

Everything here is a collective: where torch.distributed is initialised, every rank makes the call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from cobra.group import Group

Results = tuple[dict[str, Tensor], dict]
ZERO3 = "DeepSpeed ZeRO-3"
LOOKED_AT = 4096  # of each tensor, in `check_agreement`


def world_size() -> int:
    """Processes that work together; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def share(amount: int) -> int:
    """This rank's part of an amount, which differs by at most 1 between ranks."""
    return amount // world_size() + (rank() < amount % world_size())


def gather_results(work: Callable[[], Results], what: str, device: torch.device) -> list[Results]:
    """What `work` returns on every rank, in the order of ranks; where it raises on one rank, every rank raises.

    work: () -> CPU tensors by name, and plain values for JSON
    what: the work's name in the message of the ranks on which it did not fail
    device: of the tensors that travel, where the backend is not gloo
    """
    if world_size() == 1:
        return [work()]
    error = None
    try:
        tensors, values = work()
        payload = save({name: t.contiguous() for name, t in tensors.items()}, {"values": json.dumps(values)})
    except Exception as raised:
        error, payload = raised, b"!" + f"{type(raised).__name__}: {raised}".encode()
    gathered = gather_bytes(payload, device)
    if error is not None:
        raise error
    for index, found in enumerate(gathered):
        if found[:1] == b"!":
            raise RuntimeError(f"the {what} failed on rank {index}: {found[1:].decode()}")
    return [(load(found), _header(found)) for found in gathered]


def gather_bytes(payload: bytes, device: torch.device) -> list[bytes]:
    """The payload of every rank, in the order of ranks."""
    device = torch.device("cpu") if dist.get_backend() == "gloo" else device
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(payload)], device=device))
    longest = int(torch.cat(sizes).max())
    padded = torch.frombuffer(bytearray(payload.ljust(longest, b"\0")), dtype=torch.uint8).to(device)
    received = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return [bytes(t[: int(size)].cpu().numpy()) for t, size in zip(received, sizes, strict=True)]


def _header(data: bytes) -> dict:
    """The values in a safetensors header: 8 bytes of its length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["values"])


def after_step(groups: Sequence[Group], steps: int, run: str) -> None:
    """After an optimizer step: base modules let go of weights that were sharded since, and ranks of one run are compared at
    steps 1, 2, 4, 8 ... Raises RuntimeError, on every rank, where they hold different parameters.

    steps: since the parameters were made
    run: what ranks have in common that should hold the same
    """
    if not groups:
        return
    first = groups[0].layers[0][0].lora_B
    if sharded(first) is not None:
        _check_readable(first)
        for group in groups:
            for site, layers in zip(group.sites, group.layers, strict=True):
                for module, layer in zip(site.distinct_modules, layers, strict=True):
                    module.weight, module.bias = layer.weight, layer.bias
    elif world_size() > 1 and steps & (steps - 1) == 0:
        tensors = {f"{group.sites[0].name}.lora_B": group.layers[0][0].lora_B for group in groups}
        gates = {f"{group.name}.lora_gate": group.gate for group in groups if group.gate is not None}
        check_agreement(tensors | gates, run, first.device)


def check_agreement(tensors: dict[str, Tensor], run: str, device: torch.device) -> None:
    """Raises RuntimeError, on every rank, where ranks of the same run hold different tensors."""
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    first: dict[str, tuple[int, dict]] = {}
    for index, part in enumerate(gather_bytes(json.dumps([run, digests]).encode(), device)):
        theirs, found = json.loads(part)
        other, expected = first.setdefault(theirs, (index, found))
        for name, (projection, norm) in found.items():
            if abs(projection - expected[name][0]) > 1e-3 * norm:
                raise RuntimeError(
                    f"{name} differs between ranks {other} and {index}: their gradients are not averaged. Wrap the model in "
                    "DistributedDataParallel after attach(), and anew after apply(plan), which makes new parameters; "
                    "and call the wrapped model"
                )


def _digest(tensor: Tensor) -> tuple[float, float]:
    """A projection of the first elements, and their norm: equal steps of other signs project to other values."""
    values = tensor.detach().flatten()[:LOOKED_AT].double().cpu()
    return (values @ torch.arange(len(values), dtype=torch.float64).cos()).item(), values.norm().item()


def sharded(tensor: Tensor) -> str | None:
    """Who keeps this parameter in parts on the ranks: FSDP2 (or another user of DTensor), DeepSpeed ZeRO-3, or None."""
    if hasattr(tensor, "ds_id"):
        return ZERO3
    loaded = sys.modules.get("torch.distributed.tensor")  # its import takes seconds, and who shards has done it
    return "FSDP2 (DTensor)" if loaded is not None and isinstance(tensor, loaded.DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered where processes hold parts of it; differentiable, a gradient equal on all of them counts once.

    Raises ValueError for parameters of DeepSpeed ZeRO-3.
    """
    if sharded(tensor) is None:
        return tensor
    _check_readable(tensor)
    return tensor.full_tensor()


def _check_readable(tensor: Tensor) -> None:
    if sharded(tensor) == ZERO3:
        raise ValueError(f"{ZERO3} keeps the adapter's parameters in parts that COBRA cannot read; use ZeRO-2, DDP or FSDP2")


def spread(values: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` holds it: this rank's part of it, or all."""
    if sharded(like) is None:
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(like.device, like.dtype), like.device_mesh, like.placements)


def check_whole(tensors: dict[str, Tensor], what: str) -> None:
    """Raises ValueError where something shards the adapter's parameters."""
    for name, tensor in tensors.items():
        by = sharded(tensor)
        if by is not None:
            raise ValueError(
                f"{what} needs whole parameters, and {by} holds parts of {name} on each rank: save_checkpoint(path) here, then "
                f"attach() to a model that is not sharded, load_checkpoint(path) and {what} there"
            )
