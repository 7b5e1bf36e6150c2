"""The Triton path of `packed_lora` on the device it is for, bf16 too."""

import pytest
import torch
from torch.nn import functional as F

from cobra_kernels.packed_lora import packed_lora, packed_lora_ref, segment_tokens
from cobra_kernels.testing import assert_within_budget, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# ids, K, N, ranks
CASES = {
    "decoding": ([2, 0, -1, 2, 1, 0], 256, 512, (8, 0, 64)),
    "primes, which no tile divides": ([2, 0, -1, 2, 1, 0], 97, 131, (5, 7, 19)),
    "prompts": ([0] * 200 + [-1] * 30 + [2] * 150 + [0] * 90, 512, 256, (16, 5, 300)),
    "K long enough for planes": ([0, 1, 1], 4096, 128, (3, 16)),
}


def make(ids, K, N, ranks, dtype, seed):
    inputs = make_inputs((len(ids),), K, N, sum(ranks), gates=None, bias=False, dtype=dtype, device="cuda", seed=seed)
    lora_B = inputs["lora_B"].t().contiguous().t()
    ids = torch.tensor(ids, device="cuda")
    return F.linear(inputs["x"], inputs["weight"]), inputs["x"], inputs["lora_A"], lora_B, ranks, ids


def widened(operands):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in operands]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_within_budget_and_bits_repeat(case, dtype):
    draws = [make(*case, dtype, seed) for seed in range(4)]
    fast = [packed_lora(*operands, backend="triton") for operands in draws]
    ref, oracle = zip(*[(packed_lora_ref(*d), packed_lora_ref(*widened(d))) for d in draws], strict=True)
    assert_within_budget(fast, ref, oracle)
    assert torch.equal(fast[0], packed_lora(*draws[0], backend="triton"))
    base, ids = draws[0][0], draws[0][-1]
    assert torch.equal(fast[0][ids == -1], base[ids == -1])


@torch.no_grad()
def test_known_segments_wait_for_nothing():
    *operands, ids = make(*CASES["decoding"], torch.bfloat16, 0)
    segments = segment_tokens(ids)
    expected = packed_lora(*operands, segments, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = packed_lora(*operands, segments, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, expected)
