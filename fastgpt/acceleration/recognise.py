"""Candidates by attribute names and shapes: which modules look like a hot path, and what they name its parts.

Names only propose; `probe.py` decides by numbers. So the lists may be generous.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastgpt import model, model_fast
from fastgpt.acceleration import fused, probe
from fastgpt.acceleration.fused import AttentionPlan, GeluPlan, NormPlan, Plan
from fastgpt.acceleration.probe import Refused
from fastgpt.acceleration.watch import names_used, written_names
from fastgpt.fusion import is_hooked

ATTENTION, LAYER_NORM, GELU = "attention", "layer norm", "GELU"
OPS = {ATTENTION: "ops.causal_attention", LAYER_NORM: "ops.layer_norm", GELU: "ops.gelu"}

_TRIPLES = (
    ("W_query", "W_key", "W_value"),
    ("W_q", "W_k", "W_v"),
    ("w_q", "w_k", "w_v"),
    ("wq", "wk", "wv"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
)
_PACKED = ("qkv", "qkv_proj", "W_qkv", "c_attn", "to_qkv", "in_proj")
_OUT = ("out_proj", "proj", "o_proj", "c_proj", "W_out", "W_o", "wo", "to_out")
_NUM_HEADS = ("num_heads", "n_heads", "n_head", "nhead", "heads")
_CONTEXT = ("context_length", "max_seq_len", "block_size", "max_length")
_NORMS = (("scale", "shift"), ("weight", "bias"), ("gamma", "beta"))
_EPS = ("eps", "epsilon", "variance_epsilon")
_OURS = tuple(
    cls.forward
    for cls in (
        *(model.MultiHeadAttention, model.LayerNorm, model.GELU),
        *(model_fast.MultiHeadAttentionFast, model_fast.LayerNormFast),
    )
)


# Of each stored mask, what it marks: see `fused.marked_by`.
Marks = dict[str, str | None]


def kind_of(module: nn.Module) -> str | None:
    """What a module looks like, or None. Looking changes nothing and runs nothing."""
    if isinstance(module, fused.Fused):
        kinds = {NormPlan: LAYER_NORM, GeluPlan: GELU, AttentionPlan: ATTENTION}
        return kinds.get(type(module._fastgpt_plan))
    if isinstance(module, nn.MultiheadAttention) or _projections(module) is not None:
        return ATTENTION
    if next(module.children(), None) is not None or isinstance(module, nn.ModuleList | nn.Sequential):
        return None
    if _looks_like_norm(module):
        return LAYER_NORM
    return GELU if _may_be_gelu(module) else None


def make_plan(module: nn.Module, kind: str, marks: Marks) -> Plan:
    """The plan of a module that looks like `kind`, judged by structure and probe; `marks` as for `obstacle`.

    Raises:
        Refused: with the reason; the module is as it was.
    """
    if kind == LAYER_NORM:
        norm = _plan_norm(module)
        probe.probe_layer_norm(module, norm)
        return norm
    if kind == GELU:
        if isinstance(module, nn.GELU) and module.approximate != "tanh":
            raise Refused('it is the exact (erf) GELU; the book\'s is the tanh form, nn.GELU(approximate="tanh")')
        probe.probe_gelu(module)
        return GeluPlan()
    plan = _plan_attention(module, marks)
    return probe.probe_attention(module, plan, _context_length(module, plan))


def obstacle(module: nn.Module, kind: str, marks: Marks) -> str | None:
    """What speaks against swapping this very module, whatever its class computes; `marks` is what `masks` found."""
    if type(module).forward in _OURS:
        return "it is fastgpt's own and runs on the ops already"
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    if _pickles_its_own_way(type(module)):
        return "its class has its own way of being pickled"
    if probe.dtype_and_device(module)[1].type == "meta":
        return "its weights are on the meta device; load them first"
    if kind != ATTENTION:
        return None
    for name, child in module.named_children():
        if name not in _projection_names(module) and any(is_hooked(part) for part in child.modules()):
            return f"a hook on {name} would be skipped, since the op computes what {name} does"
    return next(
        (f"its {name} is not strictly causal (1 above the diagonal, else 0)" for name in marks if not marks[name]), None
    )


def _pickles_its_own_way(cls: type) -> bool:
    own = cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
    return own or hasattr(cls, "__getnewargs_ex__")


def is_worth_a_row(module: nn.Module, kind: str) -> bool:
    """False for a module that only might have been a GELU, by having neither weights nor children."""
    return kind != GELU or "gelu" in type(module).__name__.lower()


def _looks_like_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm):
        return True
    if type(module).__module__.startswith("torch.") or any(b is not None for b in module._buffers.values()):
        return False
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if any(set(names) == set(pair) for pair in _NORMS):
        return all(parameter is None or parameter.ndim == 1 for parameter in module._parameters.values())
    return len(names) == 1 and "norm" in type(module).__name__.lower()


def _plan_norm(module: nn.Module) -> NormPlan:
    for weight, bias in _NORMS:
        first, second = module._parameters.get(weight), module._parameters.get(bias)
        if first is None or second is None:
            continue
        if first.ndim != 1 or first.shape != second.shape:
            raise Refused(f"{weight} has shape {tuple(first.shape)}; fastgpt normalises the last axis alone")
        eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), 1e-5)
        return NormPlan(weight, bias, eps)
    raise Refused("it lacks a scale or a shift (RMSNorm?), so it is not the book's layer norm")


def _may_be_gelu(module: nn.Module) -> bool:
    cls = type(module)
    if isinstance(module, nn.GELU):
        return True
    if (
        cls.__module__.startswith("torch.")
        or any(True for _ in module.parameters())
        or any(True for _ in module.buffers())
    ):
        return False
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    if len(parameters) != 2 or parameters[1].kind is not parameters[1].POSITIONAL_OR_KEYWORD:
        return False
    # Only what may be one is run.
    return any("gelu" in name.lower() or name == "tanh" for name in (cls.__name__, *names_used(cls)))


def _projections(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of what gives queries, keys and values; one name three times when it is packed."""
    for triple in _TRIPLES:
        if all(isinstance(getattr(module, name, None), nn.Module | nn.Parameter) for name in triple):
            return triple
    packed = next((name for name in _PACKED if isinstance(getattr(module, name, None), nn.Module)), None)
    if packed is None or _first(module, _NUM_HEADS, int) is None:
        return None
    return packed, packed, packed


def _projection_names(module: nn.Module) -> set[str]:
    out = _first(module, _OUT, nn.Module)
    return {*(_projections(module) or ()), *([out] if out else [])}


def _plan_attention(module: nn.Module, marks: Marks) -> AttentionPlan:
    names = _projections(module)
    if isinstance(module, nn.MultiheadAttention) or names is None:
        raise Refused("PyTorch's nn.MultiheadAttention is given its mask from outside")
    bare = [name for name in names if not isinstance(getattr(module, name), nn.Module)]
    if bare:
        raise Refused(f"{bare[0]} is a bare parameter, not a layer")
    query, key, value = names
    plan = AttentionPlan(
        projections=tuple(dict.fromkeys(names)),
        query=query,
        key=key,
        value=value,
        out=_first(module, _OUT, nn.Module),
        num_heads=_first(module, _NUM_HEADS, int),
        masks=tuple(marks.items()),
        bypassed=tuple(name for name, _ in module.named_children() if name not in _projection_names(module)),
    )
    return replace(plan, parameters=more_parameters(module), state=state(module))


def more_parameters(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of forward's arguments after the input. Raises Refused for one that must be given."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            raise Refused(f"its forward asks for {parameter.name} besides the input")
        if not isinstance(parameter.default, bool | int | float | str | None):
            raise Refused(f"the default of {parameter.name} is neither a number, a word nor None")
    return tuple((p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def state(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Attributes that forward may write, with their present values. Raises Refused for a cache that is in use."""
    found = []
    for name in sorted(written_names(type(module))):
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            raise Refused(f"its forward keeps a tensor in {name}; if that is a cache, empty it (reset_cache) first")
        if not isinstance(value, bool | int | float | str | None):
            raise Refused(f"its forward writes {name}, a {type(value).__name__}")
        found.append((name, value))
    return tuple(found)


def masks(module: nn.Module, kind: str) -> Marks:
    """The masks that an attention stores: square tensors, and whatever else has "mask" in its name; what each marks."""
    if kind != ATTENTION:
        return {}
    tensors = {**module._buffers, **{name: value for name, value in vars(module).items() if isinstance(value, Tensor)}}
    return {
        name: fused.marked_by(value)
        for name, value in tensors.items()
        if value is not None and (("mask" in name and value.ndim >= 2) or _is_square(value))
    }


def _is_square(value: Tensor) -> bool:
    return value.ndim >= 2 and value.shape[-1] == value.shape[-2] and value.numel() == value.shape[-1] ** 2


def _context_length(module: nn.Module, plan: AttentionPlan) -> int | None:
    lengths = [getattr(module, name).shape[-1] for name, _ in plan.masks]
    name = _first(module, _CONTEXT, int)
    return min(lengths) if lengths else getattr(module, name) if name else None


def _first(module: nn.Module, names: tuple[str, ...], kind: type) -> str | None:
    """The first of the names under which the module holds a `kind`."""
    return next((name for name in names if isinstance(getattr(module, name, None), kind)), None)
