"""A candidate's own forward against its plan, by numbers.

The stand-in of `shadow.py` runs the reader's forward in float64 on random weights, so the bound below is far above
rounding and far below what any other formula would differ by (the exact GELU differs by 5e-4, an unbiased variance over
768 values by 6e-4). Then the op itself runs once in the model's own dtype.

    attention    7 tokens: output, order of the projections, writes;  dropout: where, how much, who switches it;
                 1024 tokens: a window that 7 tokens do not show
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.acceleration import fused
from fastgpt.acceleration.fused import AttentionPlan, NormPlan
from fastgpt.acceleration.shadow import make_shadow, quiet
from fastgpt.acceleration.watch import DropoutWatch, snapshot

# Relative to the largest value of the output.
BOUND = 2e-5
_SHORT, _LONG = 7, 1024
# Shares that no reader writes, one per candidate, so that the call tells which attribute it came from.
_ODD_SHARES = (0.28125, 0.34375, 0.40625, 0.46875)


class Refused(Exception):
    """The module is not what it looks like; the text is the reason for the report."""


def probe_layer_norm(module: nn.Module, plan: NormPlan) -> None:
    """Raise Refused unless the module computes the layer norm of `plan`."""
    n = getattr(module, plan.weight).shape[0]

    def expected(shadow: nn.Module, x: Tensor) -> Tensor:
        weight, bias, eps = _norm_arguments(shadow, plan)
        return F.layer_norm(x, (n,), weight, bias, eps)

    def run(shadow: nn.Module, x: Tensor) -> Tensor:
        return ops.layer_norm(x, *_norm_arguments(shadow, plan))

    # Rows of variance near eps show where eps is added; rows with a mean show that it is subtracted.
    x = _randn(4, 3, n)
    x[0] *= 3e-3
    x[1] *= 30.0
    x[2] += 2.0
    _compare_simple(module, x, expected, run, "layer norm over the last axis with biased variance")


def _norm_arguments(module: nn.Module, plan: NormPlan) -> tuple[Tensor, Tensor, float]:
    eps = plan.eps if isinstance(plan.eps, float) else float(getattr(module, plan.eps))
    return getattr(module, plan.weight), getattr(module, plan.bias), eps


def probe_gelu(module: nn.Module) -> None:
    """Raise Refused unless the module computes the tanh form of GELU."""
    x = 3.0 * _randn(2, 7, 71)
    _compare_simple(
        module, x, lambda _, x: F.gelu(x, approximate="tanh"), lambda _, x: ops.gelu(x), "GELU in its tanh form"
    )


Formula = Callable[[nn.Module, Tensor], Tensor]


def _compare_simple(module: nn.Module, x: Tensor, expected: Formula, run: Formula, what: str) -> None:
    dtype, device = dtype_and_device(module)
    with surroundings(device):
        shadow = _shadow(module, _wide(device))
        wide = x.to(device, _wide(device))
        before = snapshot(shadow)
        got, want = call(shadow, wide)[0], expected(shadow, wide)
        if distance(got, want) > BOUND:
            raise Refused(f"its forward is not {what}: the outputs differ by {distance(got, want):.1e} of the largest")
        refuse_writes(before, shadow)
        _run_natively(_shadow(module, dtype), x.to(device, dtype), run)


def probe_attention(module: nn.Module, plan: AttentionPlan, context_length: int | None) -> AttentionPlan:
    """Complete the plan of an attention module.

    Args:
        module: the reader's attention.
        plan: names of projections and heads, masks, candidates for bypassed modules, and state.
        context_length: the longest input, when the module says it.

    Returns:
        The plan with the order of the projections, the dropout and the tail.

    Raises:
        Refused: it is not causal attention as the op computes it, or does more than that.
    """
    dtype, device = dtype_and_device(module)
    if context_length is not None and context_length < 2:
        raise Refused("its context is a single token, which does not show whether it is causal")
    with surroundings(device):
        shadow = _shadow(module, _wide(device))
        x = _input(shadow, plan, 2, min(_SHORT, context_length or _SHORT))
        plan = _probe_output(shadow, plan, x)
        plan = _probe_dropout(module, plan, x)
        length = min(_LONG, context_length or _LONG)
        if length > x.shape[1]:
            shadow = _shadow(module, _wide(device))
            _expect_causal_attention(shadow, plan, _input(shadow, plan, 1, length))
        shadow = _shadow(module, dtype)
        _run_natively(shadow, x.to(dtype), lambda shadow, x: fused.attend(shadow, plan, x, 0.0))
    return plan


def _probe_output(shadow: nn.Module, plan: AttentionPlan, x: Tensor) -> AttentionPlan:
    inputs = set(plan.projections)
    calls: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append(name)
            if name in inputs and not (len(args) == 1 and args[0].shape == x.shape and torch.equal(args[0], x)):
                raise Refused(f"{name} is not applied to the input itself")

        return note

    before = snapshot(shadow)
    wanted = [*plan.projections, *([plan.out] if plan.out else [])]
    hooks = [getattr(shadow, name).register_forward_pre_hook(watch(name)) for name in wanted]
    tail = call(shadow, x)[1]
    for hook in hooks:
        hook.remove()
    refuse_writes(before, shadow)
    wrong = next((name for name in wanted if calls.count(name) != 1), None)
    if wrong is not None:
        raise Refused(f"its forward calls {wrong} {calls.count(wrong)} times; attention calls it once")
    plan = replace(plan, projections=tuple(name for name in calls if name in inputs), tail=tail)
    _expect_causal_attention(shadow, plan, x)
    return plan


def _expect_causal_attention(shadow: nn.Module, plan: AttentionPlan, x: Tensor) -> None:
    got, want = call(shadow, x)[0], _attention(shadow, plan, x)
    if got.shape == want.shape and distance(got, want) <= BOUND:
        return
    if got.shape != want.shape:
        raise Refused(f"its output has shape {tuple(got.shape)}; attention gives {tuple(want.shape)}")
    middle = x.shape[1] // 2
    other = x.clone()
    other[:, middle:] = _randn(*other[:, middle:].shape).to(x)
    if distance(call(shadow, other)[0][:, :middle], got[:, :middle]) > BOUND:
        raise Refused("it is not strictly causal: earlier outputs change when later tokens do")
    wrong = ~((got - want).abs().amax(dim=(0, 2)) <= BOUND * want.abs().max())
    first = int(wrong.nonzero()[0])
    where = f"from token {first} on (a window, or another mask?)" if first > 1 else "in scale, mask or positions"
    raise Refused(f"its forward is not plain causal attention; it differs {where}, by {distance(got, want):.1e}")


def _attention(module: nn.Module, plan: AttentionPlan, x: Tensor, keep: Tensor | None = None, p: float = 0.0) -> Tensor:
    q, k, v = _projected(module, plan, x)
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    weights = torch.softmax((q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf), dim=-1)
    if keep is not None:
        weights = weights * keep / (1.0 - p)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return out if plan.out is None else getattr(module, plan.out)(out)


def _projected(module: nn.Module, plan: AttentionPlan, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    made = fused.project(module, plan, x)
    widths = {name: projected.shape[-1] for name, projected in made.items()}
    if len(set(widths.values())) > 1:
        text = ", ".join(f"{name} gives {width}" for name, width in widths.items())
        raise Refused(f"queries, keys and values differ in width ({text} features): grouped-query attention?")
    try:
        return fused.split_heads(module, plan, made)
    except RuntimeError:
        width = next(iter(widths.values()))
        heads = None if plan.num_heads is None else getattr(module, plan.num_heads)
        raise Refused(f"its {width} features do not split into {heads} heads") from None


def _probe_dropout(module: nn.Module, plan: AttentionPlan, x: Tensor) -> AttentionPlan:
    """Find which attribute drops attention weights, and what turns it on."""
    names = dropout_candidates(module)
    shares = dict(zip(names, _ODD_SHARES, strict=False))
    shadow = _shadow(module, x.dtype)

    def run(training: bool, child_training: bool) -> tuple[DropoutWatch, Tensor]:
        _set_dropouts(shadow, shares, child_training)
        shadow.training = training
        watch = DropoutWatch(x, 1 if plan.num_heads is None else getattr(module, plan.num_heads))
        before = snapshot(shadow)
        with watch:
            out = call(shadow, x)[0]
        refuse_writes(before, shadow)
        return watch, out

    if run(False, False)[0].shares:
        raise Refused("it drops attention weights in eval mode too")
    watch, out = run(True, True)
    if watch.elsewhere:
        raise Refused("it drops something other than attention weights too")
    if watch.random:
        raise Refused("it draws random numbers in training other than by dropout")
    if not watch.shares:
        found = [name for name in names if fused.dropout_p(getattr(module, name)) > 0]
        if found:
            raise Refused(f"it has {found[0]}, but does not apply it to the attention weights")
        return plan
    name = next((name for name, share in shares.items() if [share] == watch.shares), None)
    if name is None:
        raise Refused(
            "which attribute holds its dropout is unclear; fastgpt looks for a Dropout or a number called drop…"
        )
    if distance(out, _attention(shadow, plan, x, watch.keep, shares[name])) > BOUND:
        raise Refused(f"{name} is not applied to the attention weights after the softmax")
    by_child, by_self = bool(run(False, True)[0].shares), bool(run(True, False)[0].shares)
    is_module = isinstance(getattr(module, name), nn.Module)
    if (by_child and by_self) or (is_module and not (by_child or by_self)) or (by_child and not is_module):
        raise Refused(f"what turns {name} on is unclear; attention drops weights in training alone")
    return replace(plan, dropout=name, dropout_switch=by_child)


def dropout_candidates(module: nn.Module) -> list[str]:
    """Names of the attributes that may hold the dropout of an attention."""
    names = [
        name
        for name, child in module.named_children()
        if isinstance(child, nn.Dropout) or (isinstance(child, nn.Identity) and "drop" in name)
    ]
    plain = (name for name, value in vars(module).items() if "drop" in name and type(value) in (float, int))
    return [*names, *plain][: len(_ODD_SHARES)]


def _set_dropouts(shadow: nn.Module, shares: dict[str, float], training: bool) -> None:
    for name, share in shares.items():
        if isinstance(getattr(shadow, name), nn.Module):
            setattr(shadow, name, nn.Dropout(share).train(training))
        else:
            setattr(shadow, name, share)


def dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Those of the first floating-point parameter or buffer; float32 on the CPU when there is none."""
    tensors = [*module.parameters(), *module.buffers()]
    first = next((t for t in tensors if t.is_floating_point()), torch.empty(0, dtype=torch.float32, device="cpu"))
    return first.dtype, first.device


def _input(shadow: nn.Module, plan: AttentionPlan, batch: int, n_tokens: int) -> Tensor:
    """Random input of the width that the query projection takes."""
    projection = getattr(shadow, plan.query)
    widths = [m.in_features for m in projection.modules() if isinstance(getattr(m, "in_features", None), int)]
    widths += [width for p in projection.parameters() if p.ndim == 2 for width in reversed(p.shape)]
    like = next((t for t in [*shadow.parameters(), *shadow.buffers()] if t.is_floating_point()), torch.empty(0))
    for width in dict.fromkeys(widths):
        x = _randn(batch, n_tokens, width).to(like)
        with contextlib.suppress(RuntimeError):
            projection(x)
            return x
    raise Refused(f"the width of its input is unclear: {plan.query} takes none of {sorted(set(widths))} features")


def _run_natively(shadow: nn.Module, x: Tensor, run: Formula) -> None:
    want = call(shadow, x)[0]
    try:
        got = run(shadow, x)
    except (ops.BackendError, ValueError) as error:
        raise Refused(f"the op cannot run it: {str(error).splitlines()[0]}") from error
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        raise Refused(
            f"in {x.dtype} it returns {want.dtype} {tuple(want.shape)}; the op {got.dtype} {tuple(got.shape)}"
        )
    # Many roundings of the dtype: the formula was judged in float64 already.
    bound = max(16 * torch.finfo(x.dtype).eps, 1e-3)
    if distance(got, want) > bound:
        raise Refused(
            f"in {x.dtype} its output and the op's differ by {distance(got, want):.1e}, more than {bound:.1e}"
        )


def call(module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[None, ...]]:
    """The module's own forward on x: the output, and the Nones that it returns after it."""
    try:
        returned = type(module).forward(module, x)
    except Refused:
        raise
    except Exception as error:  # A reader's forward may raise anything; whatever it is, it is the reason.
        raise Refused(f"its forward raised {type(error).__name__} on input {tuple(x.shape)}: {error}") from error
    out, tail = (returned[0], tuple(returned[1:])) if isinstance(returned, tuple) and returned else (returned, ())
    if not isinstance(out, Tensor) or any(value is not None for value in tail):
        raise Refused("its forward returns more than the output")
    return out, tail


def refuse_writes(before: dict[str, Any], shadow: nn.Module) -> None:
    """Raise Refused when the stand-in is not as it was; `before` is from `snapshot`."""
    after = snapshot(shadow)
    changed = next((name for name in after if after[name] != before.get(name)), None)
    if changed is not None:
        raise Refused(f"its forward writes {changed}, which the op would not")


@contextlib.contextmanager
def surroundings(device: torch.device) -> Iterator[None]:
    """`quiet`, and Refused when something was printed."""
    with quiet(device) as printed:
        yield
    if printed.getvalue():
        raise Refused("its forward prints, which the op would not")


def _shadow(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return make_shadow(module, dtype, torch.Generator("cpu").manual_seed(20))


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _randn(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(21)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite for NaN or another shape."""
    if got.shape != want.shape:
        return math.inf
    difference = (got.double() - want.double()).abs().max().item() / max(want.double().abs().max().item(), 1e-30)
    return math.inf if math.isnan(difference) else difference
