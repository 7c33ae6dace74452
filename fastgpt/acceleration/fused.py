"""What a swapped module runs.

A swapped module gets a class of its own: a subclass of the reader's class under the same name, whose `forward` calls an
op and leaves everything else alone. So Parameters, buffers, hooks, `state_dict`, `isinstance` and `print` are the
reader's; `copy.deepcopy` and pickle build the same class again from the reader's class and the plan. Nothing is written
into the reader's class, and `restore` puts it back.

Each forward takes the op only for the call that was probed, and the reader's own forward for every other: a cache in
use, an argument that is not the default, a hook on the dropout that the kernel replaces, mixed dtypes, tracing.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.fusion import attend as join_heads
from fastgpt.fusion import is_hooked, is_linear, project_qkv


@dataclass(frozen=True)
class NormPlan:
    """Names of the attributes of a layer norm; `eps` is the value where no attribute holds it."""

    weight: str
    bias: str
    eps: str | float


@dataclass(frozen=True)
class GeluPlan:
    """A GELU has nothing to name."""


@dataclass(frozen=True)
class AttentionPlan:
    """How the reader's attention reads its own attributes.

    Attributes:
        projections: the input projections in the order in which the reader's forward calls them.
        query, key, value: names of the projections; all three are one name when the projection is packed.
        out: name of the output projection, or None.
        num_heads: name of the attribute, or None for a single head.
        dropout: name of the dropout, a module or a number, or None.
        dropout_switch: True when the dropout module's own `training` turns it on, False when the attention's does.
        masks: names of the stored causal masks, each with what it marks.
        bypassed: names of the child modules that the op stands in for.
        parameters: forward's arguments after the input, with their defaults.
        state: attributes that forward may write, with the values of an unused cache.
        tail: what forward returns after the output, () when it returns the output alone.
    """

    projections: tuple[str, ...]
    query: str
    key: str
    value: str
    out: str | None
    num_heads: str | None
    dropout: str | None = None
    dropout_switch: bool = True
    masks: tuple[tuple[str, str | None], ...] = ()
    bypassed: tuple[str, ...] = ()
    parameters: tuple[tuple[str, Any], ...] = ()
    state: tuple[tuple[str, Any], ...] = ()
    tail: tuple[None, ...] = ()


@dataclass(frozen=True)
class LinearPlan:
    """An nn.Linear has nothing to name."""


Plan = NormPlan | GeluPlan | LinearPlan | AttentionPlan

# Where an attention remembers which masks it has looked at: (id, version) of each.
_STAMP = "_fastgpt_masks_seen"


class Fused(nn.Module):
    """Base of the generated classes; the reader's class comes after it."""

    _fastgpt_plan: ClassVar[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 2 is the first whose result is (constructor, (class, *arguments), state, ...).
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        _, (_, *arguments), *rest = reduced
        return rebuild, (original_class(self), self._fastgpt_plan, *arguments), *rest


class FusedLayerNorm(Fused):
    """Layer norm by `ops.layer_norm`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan: NormPlan = self._fastgpt_plan
        if len(args) == 1 and not kwargs and usable(args[0]):
            weight, bias = getattr(self, plan.weight), getattr(self, plan.bias)
            # PyTorch promotes mixed dtypes, the op keeps that of the input.
            if args[0].dtype == weight.dtype == bias.dtype:
                eps = plan.eps if isinstance(plan.eps, float) else getattr(self, plan.eps)
                return ops.layer_norm(args[0], weight, bias, eps)
        return super().forward(*args, **kwargs)


class FusedGELU(Fused):
    """GELU by `ops.gelu`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and usable(args[0]):
            return ops.gelu(args[0])
        return super().forward(*args, **kwargs)


class FusedLinear(Fused):
    """nn.Linear by `ops.linear`."""

    IS_LINEAR: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and usable(args[0]):
            x, weight = args[0], cast(Tensor, self.weight)
            # Under autocast the op casts both, as PyTorch does.
            if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
                return ops.linear(x, weight, cast("Tensor | None", self.bias))
        return super().forward(*args, **kwargs)


class FusedAttention(Fused):
    """Attention by `ops.causal_attention` between the reader's own projections."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan: AttentionPlan = self._fastgpt_plan
        x = plain_input(plan.parameters, args, kwargs)
        if x is None or not usable(x) or x.ndim != 3 or not self._fastgpt_fits(x.shape[1]):
            return super().forward(*args, **kwargs)
        out = attend(self, plan, x, self._fastgpt_dropout_p())
        return (out, *plan.tail) if plan.tail else out

    def _fastgpt_fits(self, n_tokens: int) -> bool:
        """True while this module still is what was probed."""
        plan: AttentionPlan = self._fastgpt_plan
        if not is_unused(self, plan.state):
            return False
        if any(is_hooked(getattr(self, name)) for name in plan.bypassed):
            return False
        if plan.dropout is not None and not is_dropout(getattr(self, plan.dropout)):
            return False
        if any(n_tokens > getattr(self, name).shape[-1] for name, _ in plan.masks):
            return False
        return torch.compiler.is_compiling() or self._fastgpt_masks_are_causal()

    def _fastgpt_masks_are_causal(self) -> bool:
        masks = [(getattr(self, name), marks) for name, marks in self._fastgpt_plan.masks]
        stamp = tuple((id(mask), 0 if mask.is_inference() else mask._version) for mask, _ in masks)
        if self.__dict__.get(_STAMP) == stamp:
            return True
        if any(marked_by(mask) != marks for mask, marks in masks):
            return False
        self.__dict__[_STAMP] = stamp
        return True

    def _fastgpt_dropout_p(self) -> float:
        plan: AttentionPlan = self._fastgpt_plan
        if plan.dropout is None:
            return 0.0
        dropout = getattr(self, plan.dropout)
        on = dropout.training if plan.dropout_switch and isinstance(dropout, nn.Module) else self.training
        return dropout_p(dropout) if on else 0.0


def attend(module: nn.Module, plan: AttentionPlan, x: Tensor, p: float) -> Tensor:
    """The attention of `plan`: the module's own projections, and one op between them.

    Args:
        module: where the projections are read, at every call anew.
        plan: names.
        x: (batch, n_tokens, d_in).
        p: share of attention weights to drop.

    Returns:
        (batch, n_tokens, d_out).
    """
    layers = [getattr(module, name) for name in plan.projections]
    packable = plan.projections in ((plan.query,), (plan.query, plan.key, plan.value))
    if packable and all(map(is_linear, layers)):
        made = (layers[0](x),) if len(layers) == 1 else project_qkv(layers[0], layers[1], layers[2], x)
        out = join_heads(made, 1 if plan.num_heads is None else getattr(module, plan.num_heads), p)
    else:
        q, k, v = split_heads(module, plan, project(module, plan, x))
        out = ops.causal_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
    if plan.out is not None:
        out = getattr(module, plan.out)(out)
    return out


def project(module: nn.Module, plan: AttentionPlan, x: Tensor) -> dict[str, Tensor]:
    """What each input projection makes of x, in the reader's order of calls."""
    return {name: getattr(module, name)(x) for name in plan.projections}


def split_heads(module: nn.Module, plan: AttentionPlan, made: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (batch, n_heads, n_tokens, head_dim) each, as views of what `project` made."""
    num_heads = 1 if plan.num_heads is None else getattr(module, plan.num_heads)
    batch, n_tokens, _ = made[plan.query].shape
    if plan.query == plan.key:
        q, k, v = made[plan.query].view(batch, n_tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v
    q, k, v = (
        made[name].view(batch, n_tokens, num_heads, -1).transpose(1, 2) for name in (plan.query, plan.key, plan.value)
    )
    return q, k, v


def plain_input(parameters: tuple[tuple[str, Any], ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input, when every other argument has its default; otherwise None."""
    if len(args) == 1 and not kwargs:
        return args[0]
    if not args or len(args) > len(parameters) + 1:
        return None
    defaults = dict(parameters)
    given = [(value, default) for value, (_, default) in zip(args[1:], parameters, strict=False)]
    for name, value in kwargs.items():
        if name not in defaults:
            return None
        given.append((value, defaults[name]))
    return args[0] if all(_same(value, default) for value, default in given) else None


def is_dropout(value: Any) -> bool:
    """True for what a dropout slot may hold: a Dropout, an Identity in its place, or a number."""
    return isinstance(value, nn.Dropout | nn.Identity | float | int)


def dropout_p(value: Any) -> float:
    """The share that a dropout, of one of the kinds of `is_dropout`, drops."""
    if isinstance(value, nn.Module):
        return float(value.p) if isinstance(value, nn.Dropout) else 0.0
    return float(value)


def marked_by(mask: Tensor) -> str | None:
    """What a square causal mask marks with values other than 0: "future" (the book), "past", or None: not causal."""
    length = mask.shape[-1] if mask.ndim >= 2 else 0
    if mask.is_meta or length == 0 or mask.shape[-2] != length or mask.numel() != length * length:
        return None
    marked = mask.detach().reshape(length, length) != 0
    future = torch.ones_like(marked).triu(1)
    if torch.equal(marked, future):
        return "future"
    return "past" if torch.equal(marked, ~future) else None


def fuse(module: nn.Module, plan: Any) -> None:
    """Swap the class of one module, in place."""
    module.__class__ = fused_class(type(module), plan)


def unfuse(module: nn.Module) -> bool:
    """Give a swapped module its own class again. Returns False when it was not swapped."""
    if not isinstance(module, Fused):
        return False
    module.__class__ = original_class(module)  # type: ignore[assignment]
    module.__dict__.pop(_STAMP, None)
    return True


def original_class(module: Fused) -> type[nn.Module]:
    """The reader's class of a swapped module."""
    original: type[nn.Module] = type(module).__bases__[1]
    return original


def rebuild(original: type[nn.Module], plan: Any, *arguments: Any) -> nn.Module:
    """What pickle and deepcopy call: a swapped module without its state."""
    cls = fused_class(original, plan)
    return cls.__new__(cls, *arguments)


# One class per reader's class and plan, so that equal blocks stay of equal type; it dies with its last module.
_classes: weakref.WeakValueDictionary[tuple[type, Any], type[nn.Module]] = weakref.WeakValueDictionary()
# What runs a plan; joined.py adds its own.
BASES: dict[type, type[Fused]] = {
    NormPlan: FusedLayerNorm,
    GeluPlan: FusedGELU,
    LinearPlan: FusedLinear,
    AttentionPlan: FusedAttention,
}


def fused_class(original: type[nn.Module], plan: Any) -> type[nn.Module]:
    """The swapped version of a reader's class."""
    made = _classes.get((original, plan))
    if made is None:
        names: dict[str, Any] = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        bases: tuple[type, ...] = (BASES[type(plan)], original)
        made = _classes[original, plan] = type(original.__name__, bases, {**names, "_fastgpt_plan": plan})
    return made


def usable(x: Any) -> bool:
    """True for what a kernel may be given."""
    # A kernel reads memory: it sees neither a subclass's meaning nor what torch.jit.trace records.
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def _same(value: Any, default: Any) -> bool:
    return value is default or (
        type(value) is type(default) and isinstance(value, bool | int | float) and value == default
    )


def is_unused(module: nn.Module, state: tuple[tuple[str, Any], ...]) -> bool:
    """True while a module's attributes have the values of an unused cache."""
    return all(_still(getattr(module, name, None), value) for name, value in state)


def _still(value: Any, fresh: Any) -> bool:
    return not isinstance(value, Tensor) and bool(value == fresh)
