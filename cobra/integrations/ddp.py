"""DistributedDataParallel over other parameters than it was made with."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel


def rewrap(wrapper: DistributedDataParallel) -> None:
    """Makes the wrapper anew, in place, over the parameters that its module has now: whoever holds it goes on with it.

    Every process calls it. Raises ValueError for DDP's own mixed precision, whose hooks on the module cannot be taken off.
    """
    if wrapper.mixed_precision is not None:
        raise ValueError("DistributedDataParallel(mixed_precision=) cannot follow a cut of the ranks; use autocast")
    mode, hooks = wrapper.training, wrapper._comm_hooks
    buffers = getattr(wrapper, "forward_sync_buffers", getattr(wrapper, "broadcast_buffers", True))
    settings = {
        "device_ids": wrapper.device_ids,
        "output_device": wrapper.output_device,
        "dim": wrapper.dim,
        "process_group": wrapper.process_group,
        "bucket_cap_mb": None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / 2**20,
        "find_unused_parameters": wrapper.find_unused_parameters,
        "gradient_as_bucket_view": wrapper.gradient_as_bucket_view,
        "static_graph": wrapper.static_graph,
    }
    module = wrapper.module
    del wrapper.reducer, wrapper.logger  # the old reducer takes its hooks off parameters that stay, such as a head's
    DistributedDataParallel.__init__(wrapper, module, **settings | ({} if buffers else {"broadcast_buffers": False}))
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
    wrapper.training = mode
