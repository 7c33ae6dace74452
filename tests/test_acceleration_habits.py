"""accelerate: copies, pickles, hooks, caches, dropout, torch.compile and DDP go on as before on a swapped model."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from handwritten import (
    ACCEPTED,
    CFG,
    HOT,
    CachedAttention,
    LinearWithLoRA,
    assert_close,
    build,
    gradients,
    is_swapped,
    tokens,
)
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from fastgpt import accelerate, ops, restore

accepted = pytest.mark.parametrize("name", ACCEPTED)


def test_accelerating_and_probing_leave_no_trace():
    model = build("drop_shortcut", drop_rate=0.1).train()
    model.trf_blocks[1].eval()
    calls = []
    for module in model.modules():
        if not isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    modes = [module.training for module in model.modules()]
    objects = dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    text, random = str(model), torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert calls == [] and str(model) == text
    assert all(p is objects[name] and p.grad is None for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_equal_blocks_keep_one_type_and_remain_instances_of_the_readers_class():
    model = build()
    own = type(model.trf_blocks[0].att)
    accelerate(model)
    first, second = (block.att for block in model.trf_blocks)
    assert type(first) is type(second) and isinstance(first, own) and type(first).__name__ == own.__name__


@accepted
def test_copies_and_pickles_stay_accelerated_and_independent(name):
    model, idx = build(name), tokens()
    accelerate(model)
    want = model(idx)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    for twin in copies:
        assert len(accelerate(twin).swapped) == HOT and is_swapped(twin.trf_blocks[0].att)
        assert torch.equal(twin(idx), want)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        restore(twin)
        assert not is_swapped(twin.trf_blocks[0].att)
        with torch.no_grad():
            twin.out_head.weight.zero_() if name != "lora" else twin.out_head.linear.weight.zero_()
    assert is_swapped(model.trf_blocks[0].att) and torch.equal(model(idx), want)


def test_hooks_on_swapped_modules_and_projections_run_in_the_old_order():
    def trace(model):
        seen = []
        for path, module in model.named_modules():
            if not isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda m, i, o, path=path: seen.append(path))
        model(tokens())
        return seen

    plain, fast = build(), build()
    accelerate(fast)
    assert trace(fast) == trace(plain)


def test_a_hook_on_the_dropout_is_refused_before_and_honoured_after():
    model, seen = build(), []
    model.trf_blocks[0].att.dropout.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    skipped = accelerate(model).skipped
    assert [row.path for row in skipped] == ["trf_blocks.0.att"] and "hook on dropout" in skipped[0].reason
    model.trf_blocks[1].att.dropout.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    model(tokens())
    assert seen == [(2, CFG["n_heads"], 11, 11)] * 2


def test_gradient_checkpointing_gives_the_same_gradients_with_dropout():
    model, idx = build(drop_rate=0.2).train(), tokens()
    accelerate(model)
    _, want = gradients(model, idx)
    for block in model.trf_blocks:
        block.forward = lambda x, own=block.forward: checkpoint(own, x, use_reentrant=False)
    _, got = gradients(model, idx)
    # The same draws; a block that is called alone adds in another order.
    for key in want:
        assert_close(got[key], want[key])


def test_compiles_into_one_graph():
    model, idx = build("cache_inside", n_layers=1, drop_rate=0.1), tokens()
    want, want_grads = gradients(model, idx)
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, got_grads = gradients(compiled, idx)
    assert_close(got, want)
    for key, grad in want_grads.items():
        assert_close(got_grads[f"_orig_mod.{key}"], grad, 1e-4)


def test_a_model_compiled_before_is_compiled_again():
    model, idx, graphs = build(n_layers=1), tokens(), []

    def backend(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        want = compiled(idx)
        report = accelerate(compiled)
        assert "compiles again" in str(report) and report.rows[0].path == "trf_blocks.0.att"
        assert_close(compiled(idx), want)
        restore(compiled)
        assert torch.equal(compiled(idx), want)
    assert not any("fastgpt" in name for name in graphs[0]) and any("fastgpt" in name for name in graphs[1])


def test_a_model_inside_ddp_trains_alike(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, idx = build(), tokens()
        want, want_grads = gradients(model, idx)
        wrapped = nn.parallel.DistributedDataParallel(model)
        report = accelerate(wrapped)
        assert len(report.swapped) == HOT and report.rows[0].path == "trf_blocks.0.att"
        got, got_grads = gradients(wrapped, idx)
        assert_close(got, want)
        assert_close(got_grads["module.tok_emb.weight"], want_grads["tok_emb.weight"], 1e-4)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["drop_shortcut", "packed_sdpa"])
def test_dropout_repeats_with_the_seed_and_is_right_on_average(name):
    model, x = build(name), torch.randn(2, 9, CFG["emb_dim"], generator=torch.Generator().manual_seed(1))
    att = model.trf_blocks[0].att
    accelerate(model)
    want = att(x)
    # Changed after the swap: the share is read at every call.
    if name == "drop_shortcut":
        att.dropout.p = 0.5
    else:
        att.dropout = 0.5
    att.train()

    def run(seed):
        torch.manual_seed(seed)
        return att(x)

    with torch.no_grad():
        assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
        draws = torch.stack([run(seed) for seed in range(400)])
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - want).abs() <= 5 * error + 1e-6).all()
    assert (error > 0).float().mean() > 0.9
    att.eval()
    assert torch.equal(att(x), want)


def test_the_reference_backend_draws_the_readers_own_dropout():
    model, idx = build(drop_rate=0.3).train(), tokens()
    want, want_grads = gradients(model, idx)
    accelerate(model)
    with ops.use_backend("reference"):
        got, got_grads = gradients(model, idx)
    assert_close(got, want)
    assert all(((got_grads[key] - want_grads[key]).abs().max() < 1e-5) for key in want_grads)


def test_the_dropout_modules_own_switch_is_obeyed():
    model, x = build(drop_rate=0.5), torch.randn(2, 9, CFG["emb_dim"])
    att = model.trf_blocks[0].att.train()
    att.dropout.eval()
    want = att(x)
    accelerate(model)
    assert_close(att(x), want)
    att.dropout = nn.Identity()
    assert_close(att(x), want)


def test_a_cache_in_use_takes_the_readers_own_path_and_an_unused_one_the_op():
    model, idx = build("cache_inside"), tokens(1)
    want = model(idx)
    accelerate(model)
    for part in (idx[:, :6], *idx[:, 6:].split(1, dim=1)):
        logits = model(part, use_cache=True)
    assert_close(logits[:, -1], want[:, -1])
    assert not model.trf_blocks[0].att._fastgpt_fits(4)
    for block in model.trf_blocks:
        block.att.reset_cache()
    assert model.trf_blocks[0].att._fastgpt_fits(4)
    assert_close(model(idx, use_cache=False), want)


def test_a_mask_changed_later_is_obeyed():
    model, idx = build(), tokens()
    accelerate(model)
    model(idx)
    for block in model.trf_blocks:
        block.att.mask.zero_()
    got = [block.att(model.tok_emb(idx)) for block in model.trf_blocks]
    restore(model)
    assert all(
        torch.equal(out, block.att(model.tok_emb(idx))) for out, block in zip(got, model.trf_blocks, strict=True)
    )


def test_lora_added_later_is_used():
    model, idx = build(), tokens()
    accelerate(model)
    torch.manual_seed(1)
    for block in model.trf_blocks:
        block.att.W_query = LinearWithLoRA(block.att.W_query)
    got = model(idx)
    assert_close(got, restore(model)(idx))


def test_what_a_kernel_cannot_take_runs_the_readers_forward():
    model = build()
    norm, att = model.final_norm, model.trf_blocks[0].att
    accelerate(model)
    assert norm(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(RuntimeError):
        att(torch.randn(1, CFG["context_length"] + 1, CFG["emb_dim"]))
    x = torch.randn(1, 5, CFG["emb_dim"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(att, x)
    assert_close(traced(2 * x), att(2 * x))


def test_a_pointer_that_the_plain_path_resets_is_still_reset():
    class Attention(CachedAttention):
        def forward(self, x, use_cache=False):
            if not use_cache:
                self.position = 0
            return super().forward(x, use_cache)

    att = Attention(24, 24, 0.0, 3, True).eval()
    assert accelerate(att).swapped
    x = torch.randn(1, 5, 24)
    want = restore(copy.deepcopy(att))(x)
    att(x, use_cache=True)
    assert att.position == 5
    assert_close(att(x), want)
    assert att.position == 0


def test_weights_that_are_computed_at_every_call_stay_so():
    model, idx = build(), tokens()
    for block in model.trf_blocks:
        prune.l1_unstructured(block.att.W_query, "weight", 0.5)
        parametrizations.weight_norm(block.att.W_key)
    want = model(idx)
    assert len(accelerate(model).swapped) == HOT
    assert_close(model(idx), want)
