"""Which modules of an accelerated model are joined: feed-forwards, blocks, and the model around them.

Candidates are found by what they hold, and judged by numbers, as single modules are. The reader's forward runs with a
stand-in of random behaviour for each of its parts, in both modes, and must give what the plan gives with the same
stand-ins; so a probe costs little, however large the model is.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgpt.acceleration import fused, probe, recognise
from fastgpt.acceleration.fused import Fused, FusedAttention, FusedGELU, FusedLayerNorm
from fastgpt.acceleration.joined import (
    BlockPlan,
    FeedForwardPlan,
    FusedBlock,
    FusedFeedForward,
    FusedModel,
    ModelPlan,
)
from fastgpt.acceleration.probe import Refused
from fastgpt.acceleration.shadow import make_shadow
from fastgpt.acceleration.watch import snapshot

logger = logging.getLogger("fastgpt")

_CPU = torch.device("cpu")
# Rows of the embeddings, and the lengths of (batch, n_tokens) that are probed.
_ROWS = 41
_SHAPES = ((2, 7), (1, 33))


def join(model: nn.Module) -> None:
    """Swap what may be joined, in place: from the inside outwards, since a block asks for its parts."""
    for find in (_feed_forward, _sequence, _block, _model):
        # The layers of a joined feed-forward are read one by one.
        inside = {child for part in model.modules() if isinstance(part, FusedFeedForward) for child in part.children()}
        for path, module in list(model.named_modules()):
            if isinstance(module, Fused) or module in inside:
                continue
            try:
                plan = find(module)
            except Refused as refused:
                logger.info("%s is not joined: %s", path or "the model", refused)
                continue
            if plan is not None and recognise.obstacle(module, "", {}) is None:
                fused.fuse(module, plan)


def note(model: nn.Module) -> str | None:
    """A sentence on what is joined in a model; None when nothing is."""
    kinds = {FusedFeedForward: "feed-forward", FusedBlock: "block", FusedModel: "model"}
    found = {word: sum(isinstance(part, kind) for part in model.modules()) for kind, word in kinds.items()}
    words = [f"{number} {word}{'s' * (number > 1)}" for word, number in found.items() if number]
    return f"Neighbours share one op in {', '.join(words)}." if words else None


class _StandIn(nn.Module):
    """Takes the place of a part: notes the call, and does to its input what no other part does."""

    def __init__(self, name: str, number: int, calls: list[str], parameters: Any = (), tail: Any = ()) -> None:
        super().__init__()
        self.own = (name, number, calls, parameters, tail)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, number, calls, parameters, tail = self.own
        calls.append(name)
        x = fused.plain_input(parameters, args, kwargs)
        if x is None:
            raise Refused(f"{name} is given more than its input")
        out = _change(number, x)
        return (out, *tail) if tail else out


class _DropoutStandIn(nn.Dropout):
    """The same for a dropout; the share is one that no reader writes."""

    def __init__(self, name: str, number: int, calls: list[str]) -> None:
        super().__init__(0.28125)
        self.own = (name, number, calls)

    def forward(self, input: Tensor) -> Tensor:
        name, number, calls = self.own
        calls.append(name)
        return _change(number, input)


def _change(number: int, x: Tensor) -> Tensor:
    return torch.sin((number + 2) * x + number) + x.roll(1, -1) / (number + 2)


class _NoOtherDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.dropout, torch.dropout, torch.dropout_):
            raise Refused("it drops by a function, not by a module")
        return func(*args, **(kwargs or {}))


def _feed_forward(module: nn.Module) -> FeedForwardPlan | None:
    """A module around nothing but linear layer, GELU, linear layer."""
    children = dict(module.named_children())
    if len(children) != 1 or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or _has_tensors(module):
        return None
    ((name, layers),) = children.items()
    if not _is_sequence(layers):
        return None
    width = getattr(cast(nn.Sequential, layers)[0], "in_features", None)
    if not isinstance(width, int):
        raise Refused("the width of its input is unclear")
    inputs = [_randn(2, length, width) for length in (3, 11)]
    _compare(module, {layers: _StandIn(name, 1, [])}, inputs, lambda x: _change(1, x))
    return FeedForwardPlan(name)


def _sequence(module: nn.Module) -> FeedForwardPlan | None:
    """The linear layer, GELU, linear layer themselves, where no module around them was joined."""
    return FeedForwardPlan(None) if _is_sequence(module) else None


def _is_sequence(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and len(module) == 3 and isinstance(module[1], FusedGELU)


def _block(module: nn.Module) -> BlockPlan | None:
    children = dict(module.named_children())
    att = _names(children, FusedAttention)
    norms = _names(children, FusedLayerNorm)
    drops = [name for name, child in children.items() if _is_dropout(name, child)]
    others = [name for name in children if name not in {*att, *norms, *drops}]
    if (len(att), len(norms), len(others)) != (1, 2, 1) or len(drops) > 2:
        return None
    if _has_tensors(module):
        raise Refused("it holds tensors of its own")
    (att_name,), (ff_name,) = att, others
    calls: list[str] = []
    numbers = {name: number for number, name in enumerate(children)}
    attention = cast(FusedAttention, children[att_name])._fastgpt_plan
    parts: dict[nn.Module, nn.Module] = {
        child: _DropoutStandIn(name, numbers[name], calls)
        if name in drops
        else _StandIn(name, numbers[name], calls, attention.parameters, attention.tail)
        if name == att_name
        else _StandIn(name, numbers[name], calls)
        for name, child in children.items()
    }
    width = next(children[norms[0]].parameters()).shape[0]
    inputs = [_randn(*shape, width) for shape in _SHAPES]
    plan = _plan_block(module, parts, inputs[0], calls, (att_name, ff_name, norms, drops))

    def run(x: Tensor) -> Tensor:
        return _shortcut(_shortcut(x, plan.norm1, plan.att, plan.drop_att), plan.norm2, plan.ff, plan.drop_ff)

    def _shortcut(x: Tensor, norm: str, layer: str, drop: str | None) -> Tensor:
        branch = _change(numbers[layer], _change(numbers[norm], x))
        return x + (branch if drop is None else _change(numbers[drop], branch))

    _compare(module, parts, inputs, run)
    return replace(plan, parameters=recognise.more_parameters(module), state=recognise.state(module))


def _plan_block(
    module: nn.Module, parts: Mapping[nn.Module, nn.Module], x: Tensor, calls: list[str], names: Any
) -> BlockPlan:
    """Which part is which, by the order of their calls."""
    att, ff, norms, drops = names
    with probe.surroundings(_CPU), _NoOtherDropout():
        probe.call(_shadow(module, parts), x.double())
    order = list(calls)
    for norm1, norm2 in itertools.permutations(norms):
        for drop_att, drop_ff in itertools.product([None, *drops], repeat=2):
            wanted = [norm1, att, drop_att, norm2, ff, drop_ff]
            if order == [name for name in wanted if name is not None]:
                return BlockPlan(att, ff, norm1, norm2, drop_att, drop_ff)
    raise Refused(f"its parts are called in the order {', '.join(order)}")


def _model(module: nn.Module) -> ModelPlan | None:
    children = dict(module.named_children())
    tables = [name for name, child in children.items() if type(child) is nn.Embedding]
    blocks = [name for name, child in children.items() if _are_blocks(child)]
    norms = _names(children, FusedLayerNorm)
    drops = [name for name, child in children.items() if _is_dropout(name, child)]
    others = [name for name in children if name not in {*tables, *blocks, *norms, *drops}]
    if [len(names) for names in (tables, blocks, norms, others)] != [2, 1, 1, 1] or len(drops) > 1:
        return None
    if _has_tensors(module):
        raise Refused("it holds tensors of its own")
    (stack,), (norm,), (head,), drop = blocks, norms, others, next(iter(drops), None)
    calls: list[str] = []
    chain = [f"{stack}.{index}" for index in range(len(children[stack]))]  # type: ignore[arg-type]
    numbers = {name: number for number, name in enumerate([*chain, norm, head, *drops])}
    stand_ins = [
        _StandIn(name, numbers[name], calls, cast(FusedBlock, block)._fastgpt_plan.parameters)
        for name, block in zip(chain, children[stack].children(), strict=True)
    ]
    width = cast(nn.Embedding, children[tables[0]]).embedding_dim
    small = {
        name: nn.Embedding(_ROWS, width, _weight=_randn(_ROWS, width, seed=seed).double())
        for seed, name in enumerate(tables)
    }
    parts: dict[nn.Module, nn.Module] = {
        children[stack]: nn.ModuleList(stand_ins)
        if isinstance(children[stack], nn.ModuleList)
        else nn.Sequential(*stand_ins),
        **{children[name]: _StandIn(name, numbers[name], calls) for name in (norm, head)},
        **{children[name]: _DropoutStandIn(name, numbers[name], calls) for name in drops},
        **{children[name]: table for name, table in small.items()},
    }

    def runs(tokens: str, positions: str) -> Callable[[Tensor], Tensor]:
        def run(ids: Tensor) -> Tensor:
            x = small[tokens].weight[ids] + small[positions].weight[: ids.shape[1]]
            for name in [*drops, *chain, norm, head]:
                x = _change(numbers[name], x)
            return x

        return run

    inputs = [(_randn(*shape).abs() * 1000).long() % _ROWS for shape in _SHAPES]
    more = {"parameters": recognise.more_parameters(module), "state": recognise.state(module)}
    reason = None
    for tokens, positions in itertools.permutations(tables):
        try:
            _compare(module, parts, inputs, runs(tokens, positions))
        except Refused as refused:
            reason = reason or refused
            continue
        return ModelPlan(tokens, positions, drop, stack, norm, head, **more)
    raise reason or Refused("it has no embeddings")


def _are_blocks(module: nn.Module) -> bool:
    if type(module) not in (nn.Sequential, nn.ModuleList):
        return False
    blocks = list(cast(nn.Sequential, module))
    # A block that stands there twice is one child.
    return 0 < len(blocks) == len(set(blocks)) and all(isinstance(block, FusedBlock) for block in blocks)


def _is_dropout(name: str, module: nn.Module) -> bool:
    return type(module) is nn.Dropout or (type(module) is nn.Identity and "drop" in name)


def _names(children: Mapping[str, nn.Module], kind: type) -> list[str]:
    return [name for name, child in children.items() if isinstance(child, kind)]


def _has_tensors(module: nn.Module) -> bool:
    own = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return any(isinstance(value, Tensor) for value in own)


def _randn(*shape: int, seed: int = 24) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _shadow(module: nn.Module, parts: Mapping[nn.Module, nn.Module]) -> nn.Module:
    return make_shadow(module, torch.float64, torch.Generator("cpu").manual_seed(23), parts)


def _compare(
    module: nn.Module,
    parts: Mapping[nn.Module, nn.Module],
    inputs: Sequence[Tensor],
    expected: Callable[[Tensor], Tensor],
) -> None:
    """Raise Refused unless the reader's forward gives what is expected, in both modes, and does nothing else."""
    with probe.surroundings(_CPU), _NoOtherDropout():
        for given, training in itertools.product(inputs, (False, True)):
            x = given.double() if given.is_floating_point() else given
            shadow, before_x, random = _shadow(module, parts).train(training), x.clone(), torch.get_rng_state()
            before = snapshot(shadow)
            got, tail = probe.call(shadow, x)
            want = expected(before_x)
            if tail or got.dtype != want.dtype or probe.distance(got, want) > probe.BOUND:
                raise Refused("its forward does something else with its parts")
            probe.refuse_writes(before, shadow)
            if not torch.equal(x, before_x) or not torch.equal(random, torch.get_rng_state()):
                raise Refused("its forward changes its input, or draws random numbers itself")
