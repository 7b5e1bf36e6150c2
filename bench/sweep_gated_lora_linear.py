"""Times every candidate tile of the Triton products of `gated_lora_linear`, for the tables of `gated_lora_configs`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from bench.cuda import compare_on_cuda
from cobra_kernels import gated_lora_configs as configs
from cobra_kernels import gated_lora_launch as launch

NEEDS_CUDA = True
SIZES = ((8192, 4096, 4096), (1024, 4096, 4096), (8192, 4096, 11008))  # M, K, N
TILES = (16, 64)


def sweep(deadline: float, known: Sequence[dict] = ()) -> list[dict]:
    """A row for each product, size and candidate, until time.monotonic() is past the deadline; what cannot run has no time.

    known: rows of a run that was stopped, which are not measured again
    """
    rows = list(known)
    done = [_key(row) for row in known]
    for (M, K, N), tile in product(SIZES, TILES):
        for kernel, run, candidates in _products(M, K, N, tile):
            for place, config in enumerate(dict.fromkeys(candidates)):
                row = {"kernel": kernel, "M": M, "K": K, "N": N, "rank_tile": tile, "config": vars(config)}
                if _key(row) in done:
                    continue
                if time.monotonic() > deadline:
                    return rows
                rows.append(row | {"picked": place == 0} | _timed(run, config, candidates[0]))
    return rows


def _key(row: dict) -> dict:
    return {key: row[key] for key in ("kernel", "M", "K", "N", "rank_tile", "config")}


def fastest(rows: list[dict]) -> list[dict]:
    """The best candidate of each product and size, and how much faster it is than the one that is picked."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["seconds"] is not None:
            groups.setdefault(tuple(row[key] for key in ("kernel", "M", "K", "N", "rank_tile")), []).append(row)
    table = []
    for group in groups.values():
        best = min(group, key=lambda row: row["seconds"])
        picked = next((row["seconds"] for row in group if row["picked"]), None)
        table.append(best | {"speedup": picked and picked / best["seconds"]})
    return table


def _products(M: int, K: int, N: int, tile: int) -> Iterator[tuple[str, Callable[..., Tensor], list]]:
    """Name, launch with a config, and configs, the picked one first."""
    branch = launch.Branch(
        torch.ones(tile, device="cuda"),
        torch.arange(tile, dtype=torch.int32, device="cuda"),
        torch.full((2,), tile, dtype=torch.int32, device="cuda"),
        1.0,
        tile,
        True,
    )
    x, dy, weight = _normal(M, K), _normal(M, N), _normal(N, K)
    arch = launch.arch(x)
    packed_A, packed_B, h = _normal(tile, K), _normal(tile, N), _normal(M, tile)
    base = configs.candidates_base(tile)
    tokens = configs.candidates_tokens(tile)
    yield (
        "shrink",
        lambda config: launch.shrink(x, packed_A, branch, config=config)[0],
        [configs.pick_shrink_config(M, tile, True), *configs.candidates_shrink(tile)],
    )
    yield (
        "base, forward",
        lambda config: launch.base(x, weight.t(), h, packed_B, None, branch, config),
        [configs.pick_base_config(M, N, tile, True, arch), *base],
    )
    yield (
        "base, backward",
        lambda config: launch.base(dy, weight, h, packed_A, None, branch, config),
        [configs.pick_base_config(M, K, tile, True, arch), *base],
    )
    yield (
        "tokens",
        lambda config: launch.tokens(dy, h, None, branch, config=config)[0].sum(0),
        [configs.pick_tokens_config(tile, True, False, arch), *tokens],
    )
    if configs.pick_one_pass(tile, tile, arch):
        yield (
            "tokens with g",
            lambda config: launch.tokens(dy, h, packed_B, branch, config=config)[1].sum(0),
            [configs.pick_tokens_config(tile, True, True, arch), *tokens],
        )


def _timed(run: Callable[..., Tensor], config: object, picked: object) -> dict:
    """Median seconds once the result is that of the picked tiles, or why there is none."""
    try:
        found, expected = run(config).float(), run(picked).float()
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
        comparison = compare_on_cuda("sweep", "one", {"one": lambda: run(config)}, rounds=10, warmup=1)
    except Exception as error:  # too much shared memory for this device, or a result that is wrong: the row says so
        return {"seconds": None, "error": f"{type(error).__name__}: {error}"[:300]}
    return {"seconds": comparison.timings[0].median}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda") / shape[-1] ** 0.5
