"""What feed-forwards, blocks and whole models run whose parts were swapped: neighbours joined into one op.

As in fastgpt's own models (`fastgpt.fusion`), the bias of the first layer of a feed-forward is added inside the GELU, a
shortcut and its dropout in the pass that normalises the sum for the next layer, and both embeddings and their dropout
are one op. The modules stay the reader's, and are looked up at every call; one that is hooked or was replaced is called
as it is. Where more than that has changed, or the call is not the one that was probed, the reader's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgpt import fusion
from fastgpt.acceleration import fused
from fastgpt.acceleration.fused import Fused, FusedAttention, FusedGELU, FusedLayerNorm, NormPlan


@dataclass(frozen=True)
class FeedForwardPlan:
    """`layers` names the nn.Sequential of linear layer, GELU, linear layer; None when it is the module itself."""

    layers: str | None


@dataclass(frozen=True)
class BlockPlan:
    """Names of the modules of a block x + drop_att(att(norm1(x))), then x + drop_ff(ff(norm2(x))).

    Attributes:
        att, ff, norm1, norm2: as in the formula.
        drop_att, drop_ff: dropouts, often one and the same; None for none.
        parameters: forward's arguments after the input, with their defaults.
        state: attributes that forward may write, with the values of an unused cache.
    """

    att: str
    ff: str
    norm1: str
    norm2: str
    drop_att: str | None
    drop_ff: str | None
    parameters: tuple[tuple[str, Any], ...] = ()
    state: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class ModelPlan:
    """Names of the modules of a model head(norm(blocks(drop(tokens[ids] + positions[0, 1, ...])))).

    Attributes:
        tokens, positions: the embeddings.
        drop: the dropout of their sum, or None.
        blocks, norm, head: as in the formula.
        parameters, state: as in `BlockPlan`.
    """

    tokens: str
    positions: str
    drop: str | None
    blocks: str
    norm: str
    head: str
    parameters: tuple[tuple[str, Any], ...] = ()
    state: tuple[tuple[str, Any], ...] = ()


class FusedFeedForward(Fused):
    """narrow(gelu(widen(x))), the first bias added inside the GELU."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _may_join(args[0]):
            layers = self._fastgpt_layers()
            if layers is not None and takes(layers[0], args[0]) and takes(layers[2], args[0]):
                return fusion.feed_forward(layers[0], layers[2], args[0])
        return super().forward(*args, **kwargs)

    def _fastgpt_layers(self) -> nn.Sequential | None:
        """The layers while they may be joined, else None."""
        plan: FeedForwardPlan = self._fastgpt_plan
        layers = self if plan.layers is None else getattr(self, plan.layers)
        if layers is not self and not fusion.is_plain(layers, nn.Sequential):
            return None
        sequence = cast(nn.Sequential, layers)
        return sequence if len(sequence) == 3 and is_swapped(sequence[1], FusedGELU) else None


class FusedBlock(Fused):
    """A block whose first shortcut is added where the sum is normalised."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan: BlockPlan = self._fastgpt_plan
        x = fused.plain_input(plan.parameters, args, kwargs)
        part = self._fastgpt_parts() if _may_join(x) else None
        if part is None or x.ndim != 3:
            return super().forward(*args, **kwargs)
        return fusion.run_block(part, x, norm_parts_like(x))

    def _fastgpt_parts(self) -> fusion.BlockParts | None:
        """The modules while this block still is what was probed, else None."""
        plan: BlockPlan = self._fastgpt_plan
        names = (plan.att, plan.ff, plan.norm1, plan.norm2, plan.drop_att, plan.drop_ff)
        part = fusion.BlockParts(*(None if name is None else getattr(self, name) for name in names))  # type: ignore[arg-type]
        return part if isinstance(part.att, FusedAttention) and fused.is_unused(self, plan.state) else None


class FusedModel(Fused):
    """A model whose blocks are joined with each other, and its embeddings with their dropout."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan: ModelPlan = self._fastgpt_plan
        hidden = self.hidden_or_none(fused.plain_input(plan.parameters, args, kwargs))
        return super().forward(*args, **kwargs) if hidden is None else getattr(self, plan.head)(hidden)

    def hidden_or_none(self, ids: Any) -> Tensor | None:
        """What goes into the output head, (batch, n_tokens, emb_dim); None where the reader's own forward must run.

        Args:
            ids: token ids, (batch, n_tokens), int64 or int32.
        """
        plan: ModelPlan = self._fastgpt_plan
        tokens, positions, blocks = (getattr(self, name) for name in (plan.tokens, plan.positions, plan.blocks))
        drop = None if plan.drop is None else getattr(self, plan.drop)
        p = fusion.dropout_p(drop)
        if p is None or not _are_ids(ids) or not fused.is_unused(self, plan.state):
            return None
        if not (fusion.is_plain(blocks, nn.Sequential) or fusion.is_plain(blocks, nn.ModuleList)):
            return None
        # One token too many is the reader's error to raise.
        if not fusion.is_table(positions) or ids.shape[1] > positions.weight.shape[0]:
            return None
        x = fusion.embed(tokens, positions, ids, p)
        if x is None:
            return None
        return fusion.run_blocks(blocks, getattr(self, plan.norm), x, _parts, norm_parts_like(x))

    @property
    def output_head(self) -> nn.Module:
        """The output head."""
        head: nn.Module = getattr(self, self._fastgpt_plan.head)
        return head


def _parts(block: nn.Module) -> fusion.BlockParts | None:
    return cast(FusedBlock, block)._fastgpt_parts() if is_swapped(block, FusedBlock) else None


def is_swapped(module: Any, base: type[Fused]) -> bool:
    """True when calling this module does what the forward of `base` says, and nothing else."""
    return isinstance(module, base) and fusion.is_plain(module, type(module))


def norm_parts_like(x: Tensor) -> Callable[[nn.Module], tuple[Tensor, Tensor, float] | None]:
    """Gives (weight, bias, eps) of a swapped norm in the dtype of x, None of every other module."""

    def norm_parts(module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
        if not is_swapped(module, FusedLayerNorm):
            return None
        plan: NormPlan = cast(FusedLayerNorm, module)._fastgpt_plan
        weight, bias = getattr(module, plan.weight), getattr(module, plan.bias)
        # PyTorch promotes mixed dtypes, the op keeps that of its input.
        if not weight.dtype == bias.dtype == x.dtype:
            return None
        return weight, bias, plan.eps if isinstance(plan.eps, float) else getattr(module, plan.eps)

    return norm_parts


def takes(layer: nn.Module, x: Tensor) -> bool:
    """True where a linear layer takes x as it is, or autocast casts both; and for every layer that is none."""
    return (
        not fusion.is_linear(layer)
        or x.dtype == cast(nn.Linear, layer).weight.dtype
        or torch.is_autocast_enabled(x.device.type)
    )


def _may_join(x: Any) -> bool:
    # torch.compile finds what to join on its own, and hooks on every module would be skipped.
    return fused.usable(x) and not torch.compiler.is_compiling() and not _has_global_hooks()


def _are_ids(ids: Any) -> bool:
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined]
    if type(ids) is not Tensor or tracing or _has_global_hooks():
        return False
    return ids.ndim == 2 and ids.numel() > 0 and ids.dtype in (torch.int64, torch.int32)


def _has_global_hooks() -> bool:
    return bool(torch.nn.modules.module._has_any_global_hook())


fused.BASES.update({FeedForwardPlan: FusedFeedForward, BlockPlan: FusedBlock, ModelPlan: FusedModel})
