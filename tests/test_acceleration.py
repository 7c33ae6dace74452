"""accelerate: hand-written models keep their numbers, objects and habits, or are left alone with the reason."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from handwritten import ACCEPTED, CFG, REFUSED, LinearWithLoRA, build
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt import accelerate, attention_variants, ops, reference, restore
from fastgpt.testing import assert_within_bound

accepted = pytest.mark.parametrize("name", ACCEPTED)
refused = pytest.mark.parametrize("name", REFUSED)
HOT = 2 * 4 + 1  # attention, GELU and two norms a block, and the final norm


def tokens(batch=2, length=11):
    return torch.randint(CFG["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(3))


def gradients(model, idx, seed=5):
    """Logits and the gradients of the book's loss, by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = model(idx[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(got, want, bound=2e-5):
    assert (got - want).abs().max() <= bound * max(1.0, want.abs().max())


def is_swapped(module):
    return hasattr(module, "_fastgpt_plan")


@accepted
def test_logits_gradients_and_greedy_tokens_stay(name):
    model, idx = build(name), tokens()
    model.tok_emb.weight.requires_grad_(False)
    want, want_grads = gradients(model, idx)
    want_tokens = reference.generate_text_simple(model, idx[:, :4], 9, CFG["context_length"])
    assert len(accelerate(model).swapped) == HOT
    got, got_grads = gradients(model, idx)
    assert_close(got, want)
    assert got_grads["tok_emb.weight"] is None and got_grads.keys() == want_grads.keys()
    for key, grad in want_grads.items():
        assert (grad is None) == (got_grads[key] is None), key
        if grad is not None:
            assert_close(got_grads[key], grad, 1e-4)
    assert torch.equal(reference.generate_text_simple(model, idx[:, :4], 9, CFG["context_length"]), want_tokens)


@accepted
def test_restored_models_give_the_old_bits(name):
    model, idx = build(name), tokens()
    before = [dict(vars(module)) for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    want, want_grads = gradients(model, idx)
    accelerate(model)
    model(idx)
    assert restore(model) is restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [vars(module).keys() for module in model.modules()] == [old.keys() for old in before]
    got, got_grads = gradients(model, idx)
    assert torch.equal(got, want)
    assert all(grad is got_grads[key] is None or torch.equal(grad, got_grads[key]) for key, grad in want_grads.items())


@refused
def test_what_computes_something_else_is_left_untouched_with_the_reason(name):
    model, (_, kind, words) = build(name, drop_rate=0.1), REFUSED[name]
    classes = {path: type(module) for path, module in model.named_modules()}
    report = accelerate(model)
    assert {row.kind for row in report.skipped} == {kind}
    for row in report.skipped:
        assert words in row.reason
        assert type(model.get_submodule(row.path)) is classes[row.path]
    assert {row.kind for row in report.swapped} == {"attention", "layer norm", "GELU"} - {kind}


@pytest.mark.parametrize("marks", [torch.zeros, torch.ones], ids=["zeros", "ones"])
def test_a_mask_that_is_not_causal_is_refused(marks):
    model = build()
    for block in model.trf_blocks:
        block.att.mask = marks(CFG["context_length"], CFG["context_length"])
    skipped = accelerate(model).skipped
    assert [row.path for row in skipped] == ["trf_blocks.0.att", "trf_blocks.1.att"]
    assert all("mask is not strictly causal" in row.reason for row in skipped)


def test_attention_without_mask_is_refused():
    skipped = accelerate(nn.ModuleList([attention_variants.SelfAttention_v2(8, 8)])).skipped
    assert "earlier outputs change when later tokens do" in skipped[0].reason


def test_an_output_projection_of_zeros_does_not_hide_another_formula():
    model = build("overridden")
    for block in model.trf_blocks:
        nn.init.zeros_(block.att.out_proj.weight)
    assert all("not plain causal attention" in row.reason for row in accelerate(model).skipped)
    assert len(accelerate(model).skipped) == 2


def test_a_forward_set_on_the_instance_is_refused():
    model = build()
    att = model.trf_blocks[0].att
    att.forward = lambda x: x
    assert "overridden on the instance" in accelerate(model).skipped[0].reason
    assert not is_swapped(att) and is_swapped(model.trf_blocks[1].att)


def test_bfloat16_is_at_least_as_near_to_the_truth():
    model, idx = build(), tokens()
    model.bfloat16()
    truth, naive = copy.deepcopy(model).float()(idx), model(idx)
    assert len(accelerate(model).swapped) == HOT
    assert_within_bound(model(idx), naive, truth)


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


def test_accelerating_twice_is_accelerating_once():
    model = build()
    first = accelerate(model)
    classes = [type(module) for module in model.modules()]
    assert accelerate(model) == first
    assert [type(module) for module in model.modules()] == classes


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
    assert all(torch.equal(got[key], want[key]) for key in want)


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


def test_a_full_cache_is_refused_with_what_to_do():
    model = build("cache_inside")
    model(tokens(), use_cache=True)
    assert "reset_cache" in accelerate(model).skipped[0].reason


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
    traced = torch.jit.trace(att, x)
    assert_close(traced(2 * x), att(2 * x))


def test_float64_gradients_pass_gradcheck():
    att = build().double().trf_blocks[0].att
    assert accelerate(att).swapped
    x = torch.randn(1, 4, CFG["emb_dim"], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(att, (x,))


def test_the_plain_reference_model_trains_with_equal_losses():
    cfg = CFG | {"drop_rate": 0.0, "qkv_bias": False}
    torch.manual_seed(0)
    plain = reference.GPTModel(cfg)
    fast = copy.deepcopy(plain)
    assert len(accelerate(fast).swapped) == HOT
    losses = []
    for model in (plain, fast):
        optimizer, idx = torch.optim.AdamW(model.parameters(), lr=1e-2), tokens(4, 20)
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = reference.GPTModel(CFG | {"drop_rate": 0.0, "qkv_bias": False})
    assert "meta device" in next(row for row in accelerate(model).skipped if row.kind == "layer norm").reason


def test_fastgpts_own_model_is_said_to_be_fast_already():
    model = fastgpt.GPTModel(CFG | {"drop_rate": 0.0, "qkv_bias": False})
    report = accelerate(model)
    assert not report.swapped and all("runs on the ops already" in row.reason for row in report.skipped)


def test_the_report_prints_as_a_table_with_blocks_put_together():
    text = str(accelerate(build("exact_gelu")))
    assert text.splitlines()[0] == "fastgpt runs 7 of 9 modules: 2 of 2 attention, 0 of 2 GELU, 5 of 5 layer norm."
    assert "trf_blocks.0-1.att" in text and "trf_blocks.0-1.ff.1" in text
    assert "ops.causal_attention" in text and "exact (erf)" in text
    assert max(map(len, text.splitlines())) <= 100
    assert accelerate(build("exact_gelu")).counts() == {"attention": (2, 2), "GELU": (0, 2), "layer norm": (5, 5)}


def test_a_model_without_hot_paths_says_what_is_looked_for():
    report = accelerate(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)))
    assert report.rows == () and "W_query" in str(report)


def test_something_else_than_a_module_is_a_type_error():
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match="takes a model"):
            function({"emb_dim": 3})
