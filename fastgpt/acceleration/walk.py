"""`accelerate` and `restore`: the walk over a reader's model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgpt.acceleration import fused, neighbours
from fastgpt.acceleration.fused import LinearPlan, Plan
from fastgpt.acceleration.probe import Refused
from fastgpt.acceleration.recognise import OPS, Marks, is_worth_a_row, kind_of, make_plan, masks, obstacle
from fastgpt.acceleration.report import Report, Row


def accelerate(model: nn.Module) -> Report:
    """Let the attention, layer norm and GELU modules of a hand-written model run on fastgpt's ops, in place.

    Modules are recognised by what they are made of, not by class, and each is swapped only after its own forward and
    the op gave the same numbers on random weights. Where one was swapped, the model's plain nn.Linear layers run on
    `ops.linear` too, and feed-forwards, blocks and the model join what stands next to each other: a dropout, its
    shortcut and the next norm become one op (the report's notes count them). Everything else stays the reader's: the
    same Parameter objects and names, `state_dict` to the bit, hooks, LoRA layers. Copies, pickles, DDP, checkpointing
    and torch.compile work as before. A forward with a cache runs on the op when the cache is not in use.

    Not for double backward or torch.func transforms, which the kernels do not offer: `restore` first.

    Args:
        model: any nn.Module; one wrapped by DistributedDataParallel or torch.compile is looked into.

    Returns:
        Report: print it to see each module and why it was swapped or left untouched.

    Raises:
        TypeError: `model` is not a module.
    """
    _check(model, "accelerate")
    known: dict[Any, Plan | str] = {}
    rows = []
    for path, module in _unwrap(model).named_modules():
        kind = kind_of(module)
        if kind is None:
            continue
        reason = None if isinstance(module, fused.Fused) else _swap(module, kind, known)
        if reason is None or is_worth_a_row(module, kind):
            rows.append(Row(path, kind, reason is None, reason or OPS[kind]))
    if any(row.swapped for row in rows):
        _swap_linear_layers(_unwrap(model))
        neighbours.join(_unwrap(model))
    return Report(tuple(rows), _notes(model))


def _swap_linear_layers(model: nn.Module) -> None:
    """A product is a product: nothing to probe, and no row of the report."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            fused.fuse(module, LinearPlan())


def restore(model: nn.Module) -> nn.Module:
    """Give every swapped module its own forward again; nothing happens where nothing was swapped.

    Args:
        model: what was given to `accelerate`, or any part or copy of it.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not a module.
    """
    _check(model, "restore")
    for module in model.modules():
        fused.unfuse(module)
    return model


def _check(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} takes a model (torch.nn.Module), changed in place; got {type(model).__name__}.")


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _swap(module: nn.Module, kind: str, known: dict[Any, Plan | str]) -> str | None:
    """Swap one module. Returns why not, or None."""
    marks = masks(module, kind)
    reason = obstacle(module, kind, marks)
    if reason is not None:
        return reason
    key = _likeness(module, marks)
    if key not in known:
        try:
            known[key] = make_plan(module, kind, marks)
        except Refused as refused:
            known[key] = str(refused)
    plan = known[key]
    if isinstance(plan, str):
        return plan
    fused.fuse(module, plan)
    return None


def _likeness(module: nn.Module, marks: Marks) -> Any:
    """What a probe's outcome depends on, so that equal blocks are probed once."""
    parameters = tuple((name, None if p is None else _look(p)) for name, p in module._parameters.items())
    # Two masks that mark the same are alike; everything else that is no number is compared by identity.
    others = tuple(
        (name, (*_look(getattr(module, name)), marks[name]) if name in marks else _value(value))
        for name, value in [*sorted(vars(module).items()), *module._buffers.items()]
        if name[0] != "_" and name != "training"
    )
    children = tuple((name, _likeness(child, {})) for name, child in module.named_children())
    return type(module), parameters, others, children


def _value(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _notes(model: nn.Module) -> tuple[str, ...]:
    parts = list(model.modules())
    compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)
    notes = [neighbours.note(_unwrap(model))]
    if compiled:
        notes.append("It was compiled before: torch.compile sees the new forwards and compiles again at the next call.")
    return tuple(note for note in notes if note is not None)
