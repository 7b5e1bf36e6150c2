"""Loaders of serving engines, from the sources in their wheels, run on the CPU: what each makes of an adapter folder.

The folder named by COBRA_ENGINE_WHEELS holds vllm-*.whl, sglang-*.whl, and a checkout of llama.cpp as `llama.cpp`. The modules
that read adapters run as they are; everything that they import from elsewhere in their package, and never call here, is a stub.
"""

import importlib.abc
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

VLLM = {"vllm.config.lora", "vllm.config.utils", "vllm.lora.peft_helper", "vllm.lora.lora_model", "vllm.lora.lora_weights"}
VLLM |= {"vllm.lora.utils"}
SGLANG = {f"sglang.srt.lora.{name}" for name in ("lora", "lora_config", "mem_pool", "utils")}
SGLANG |= {"sglang.srt.layers.utils", "sglang.srt.layers.utils.common"}
GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

SGLANG_STACKS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}


def llama():
    """A small random Llama: the names and stacked projections that serving engines know best."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


class _StubType(type):
    """Any attribute, call or item of a stub is the stub again; it is false, and no instance of anything."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub

    def __call__(cls, *args, **kwargs):
        return Stub if cls is Stub else super().__call__(*args, **kwargs)

    def __getitem__(cls, key):
        return Stub

    def __bool__(cls):
        return False


class Stub(metaclass=_StubType):
    pass


class _Wheel(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of a package: `real` ones in the wheel, others as stubs with the given attributes."""

    def __init__(self, wheel: Path, package: str, real: set[str], given: dict[str, dict]):
        self.archive, self.package, self.real, self.given = zipfile.ZipFile(wheel), package, real, given

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return ModuleType(spec.name)

    def exec_module(self, module):
        name = module.__name__
        module.__dict__.update(self.given.get(name, {}))
        if name not in self.real:
            module.__getattr__ = lambda attribute: _StubType.__getattr__(Stub, attribute)
            return
        files = {f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"} & set(self.archive.namelist())
        (file,) = files
        exec(compile(self.archive.read(file), file, "exec"), module.__dict__)


@contextmanager
def loaded(package: str, real: set[str], given: dict[str, dict]):
    """The package can be imported in the block, and is gone after it."""
    finder = _Wheel(engine_file(f"{package}-*.whl"), package, real, given)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


def engine_file(pattern: str) -> Path:
    folder = os.environ.get("COBRA_ENGINE_WHEELS")
    if not folder:
        pytest.skip("COBRA_ENGINE_WHEELS is not set: name a folder with vllm-*.whl, sglang-*.whl and llama.cpp")
    found = sorted(Path(folder).glob(pattern))
    if not found:
        pytest.skip(f"no {pattern} in the folder that COBRA_ENGINE_WHEELS names")
    return found[-1]


def peft_updates(folder: Path, model) -> dict[str, torch.Tensor]:
    """Module -> ΔW, here and below; an adapter that does not load raises."""
    from peft import PeftModel

    return _lora_updates(PeftModel.from_pretrained(model, folder).base_model.model)


def transformers_updates(folder: Path, model) -> dict[str, torch.Tensor]:
    model.load_adapter(str(folder))
    return _lora_updates(model)


def _lora_updates(model) -> dict[str, torch.Tensor]:
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def vllm_updates(folder: Path, max_lora_rank: int = 512) -> dict[str, torch.Tensor]:
    given = {"vllm.envs": {"VLLM_LORA_ENABLE_DUAL_STREAM": False}}
    with loaded("vllm", VLLM, given):
        from vllm.config.lora import LoRAConfig
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        helper = PEFTHelper.from_local_dir(str(folder), None)
        helper.validate_legal(LoRAConfig(max_lora_rank=max_lora_rank))
        names = {key.split(".")[-3] for key in load_file(folder / "adapter_model.safetensors")}
        options = {"lora_model_id": 1, "device": "cpu", "dtype": torch.float32}
        lora = LoRAModel.from_local_checkpoint(str(folder), names, helper, **options)
        return {name: layer.optimize().lora_b @ layer.lora_a for name, layer in lora.loras.items()}


def sglang_updates(folder: Path, model) -> dict[str, torch.Tensor]:
    """Through the adapter's own stacking and the memory pool's buffers, as large as its r."""
    parallel = SimpleNamespace(tp_size=1, tp_rank=0, attn_tp_size=1, moe_ep_size=1, moe_ep_rank=0, moe_tp_size=1, moe_tp_rank=0)
    given = {
        "sglang.srt.runtime_context": {"get_parallel": lambda: parallel},
        "sglang.srt.lora.layers": {"unwrap_lora_layer": lambda module: module},
    }
    with loaded("sglang", SGLANG, given):
        from sglang.srt.lora.lora import LoRAAdapter
        from sglang.srt.lora.lora_config import LoRAConfig
        from sglang.srt.lora.mem_pool import LoRAMemoryPool
        from sglang.srt.lora.utils import get_normalized_target_modules

        config = LoRAConfig(path=str(folder))
        adapter = LoRAAdapter("0", config, model.config, Stub, Stub, model)
        adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
        targets = get_normalized_target_modules(config.target_modules)
        pool = LoRAMemoryPool(model.config, 1, torch.float32, config.r, targets, model, "lru", 0)
        layer = SimpleNamespace(slice_lora_a_weights=lambda a: a, slice_lora_b_weights=lambda b: b)
        modules = [{f"model.layers.{i}.{name}": layer for name in targets} for i in range(model.config.num_hidden_layers)]
        pool.load_lora_weight_to_buffer("0", 0, adapter, modules, None, None)
    sizes = {name: module.out_features for name, module in model.named_modules() if hasattr(module, "out_features")}
    updates = {}
    for stack, parts in SGLANG_STACKS.items():
        for i, (a, b) in enumerate(zip(pool.A_buffer.get(stack, []), pool.B_buffer.get(stack, []), strict=True)):
            names = [f"model.layers.{i}.{part}" for part in parts]
            for name, one_a, one_b in zip(names, a[0].split(config.r), b[0].split([sizes[n] for n in names]), strict=True):
                updates[name] = adapter.scaling * one_b @ one_a
    return updates


def gguf_updates(folder: Path, model, out: Path) -> dict[str, torch.Tensor]:
    """Through llama.cpp's converter; then its rule of scale, alpha / rank or 1 where alpha is 0."""
    import gguf

    script = engine_file("llama.cpp") / "convert_lora_to_gguf.py"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out / "base")
    command = [sys.executable, str(script), "--base", str(out / "base"), "--outfile", str(out / "lora.gguf"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    reader = gguf.GGUFReader(out / "lora.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    updates = {}
    for name in {name.rsplit(".", 1)[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        _, block, module, _ = name.split(".")
        scale = alpha / b.shape[1] if alpha else 1.0
        update = scale * b @ a
        if module in ("attn_q", "attn_k"):
            update = _rotary_order(
                update, model.config.num_attention_heads if module == "attn_q" else model.config.num_key_value_heads
            )
        updates[f"model.layers.{block}.{GGUF_NAMES[module]}"] = update
    return updates


def _rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as transformers has them: the two halves of a head apart, where llama.cpp has pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rewrite(folder: Path, edit) -> Path:
    """Lets `edit(config, tensors)` change an adapter folder in place."""
    from safetensors.torch import save_file

    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    return folder
