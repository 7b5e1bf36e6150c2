"""Functions of tensors: every operation COBRA is made of, each with its plain reference `<op>_ref`."""

from cobra_kernels.concrete_sample import ConcreteSample, draw_words
from cobra_kernels.conductance_reduce import conductance_reduce, conductance_reduce_ref
from cobra_kernels.gate_kl import gate_kl, gate_kl_ref, gate_kl_sampled
from cobra_kernels.gated_lora_linear import gated_lora_linear, gated_lora_linear_ref
from cobra_kernels.gated_lora_linears import GatedLora, gated_lora_linears, gated_lora_linears_ref
from cobra_kernels.gates_and_kl import gates_and_kl, gates_and_kl_ref
from cobra_kernels.ghost_grad_norm import ghost_grad_norm, ghost_grad_norm_ref
from cobra_kernels.interpolate_path import interpolate_path, interpolate_path_ref
from cobra_kernels.merge_lora import merge_lora, merge_lora_ref
from cobra_kernels.packed_lora import Segments, packed_lora, packed_lora_, packed_lora_ref, segment_tokens
from cobra_kernels.philox import gate_noise, philox4x32_ref
from cobra_kernels.sample_gates import concrete_gates, concrete_gates_ref, sample_gates, sample_gates_ref

__all__ = [
    "ConcreteSample",
    "GatedLora",
    "Segments",
    "concrete_gates",
    "concrete_gates_ref",
    "conductance_reduce",
    "conductance_reduce_ref",
    "draw_words",
    "gate_kl",
    "gate_kl_ref",
    "gate_kl_sampled",
    "gate_noise",
    "gated_lora_linear",
    "gated_lora_linear_ref",
    "gated_lora_linears",
    "gated_lora_linears_ref",
    "gates_and_kl",
    "gates_and_kl_ref",
    "ghost_grad_norm",
    "ghost_grad_norm_ref",
    "interpolate_path",
    "interpolate_path_ref",
    "merge_lora",
    "merge_lora_ref",
    "packed_lora",
    "packed_lora_",
    "packed_lora_ref",
    "philox4x32_ref",
    "sample_gates",
    "sample_gates_ref",
    "segment_tokens",
]
