"""Generator and the book's generating functions: the tokens of the plain loop, without side effects."""

from __future__ import annotations

import copy
import functools
import gc

import pytest
import torch
from generation_cases import SMALL, random_case, small_model
from torch import nn

import fastgpt
from fastgpt import reference
from fastgpt.generation import Generator, OutOfRangeError, PromptError, generate, generate_text_simple
from fastgpt.generation.cache import Cache
from fastgpt.model import GPTModel

CONTEXT = SMALL["context_length"]
GREEDY = functools.partial(reference.generate_text_simple, context_size=CONTEXT)


def prompt(batch=2, n_tokens=5, seed=3):
    return torch.randint(SMALL["vocab_size"], (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def modes(model):
    return [module.training for module in model.modules()]


# Token for token.


@pytest.mark.parametrize("group", range(8))
def test_random_models_and_options_give_the_tokens_of_the_plain_loop(group):
    for seed in range(25 * group, 25 * group + 25):
        case = random_case(seed)
        torch.manual_seed(seed)
        want = reference.generate(case.model, case.prompts, case.max_new_tokens, case.context_length, **case.options)
        after = torch.get_rng_state()
        for function in (
            lambda case=case: Generator(case.model).generate(case.prompts, case.max_new_tokens, **case.options),
            lambda case=case: generate(
                case.model, case.prompts, case.max_new_tokens, case.context_length, **case.options
            ),
        ):
            torch.manual_seed(seed)
            got = function()
            assert torch.equal(got, want), f"case {seed}: {got.tolist()}, wanted {want.tolist()}"
            assert torch.equal(torch.get_rng_state(), after), f"case {seed}: other random numbers were drawn"


@pytest.mark.parametrize("group", range(4))
def test_each_row_of_a_ragged_list_gets_what_it_gets_alone(group):
    for seed in range(25 * group, 25 * group + 25):
        case = random_case(seed)
        eos_id = case.options["eos_id"]
        got = Generator(case.model).generate(case.ragged, case.max_new_tokens, eos_id=eos_id)
        for row, ids in zip(got, case.ragged, strict=True):
            want = reference.generate(case.model, ids[None], case.max_new_tokens, case.context_length, eos_id=eos_id)[0]
            assert torch.equal(row, want), f"case {seed}: {row.tolist()}, wanted {want.tolist()}"


def test_rows_that_begin_alike_share_the_reading_and_get_what_they_get_alone():
    model, frame = small_model(), prompt(1, 9)[0].tolist()
    for tails in ([[1], [2, 3], [4, 5, 6]], [[1], [1]], [[], [7], [7, 8]], [[3, 1], [3, 2, 2], [3]]):
        rows = [frame + tail for tail in tails]
        got = Generator(model).generate(rows, 12)
        for row, ids in zip(got, rows, strict=True):
            assert torch.equal(row, GREEDY(model, torch.tensor([ids]), 12)[0])


@pytest.mark.parametrize(
    ("rows", "n_tokens_read"),
    [
        ([list(range(9)) + [20], list(range(9)) + [21, 22]], 9 + 2 * 2),
        # The last token of every row is read with its row, so two equal rows share all but one.
        ([list(range(9)), list(range(9))], 8 + 2),
        # Too little in common, and nothing to share it with.
        ([list(range(5)) + [20], list(range(5)) + [21]], 2 * 6),
        ([list(range(12))], 12),
    ],
)
def test_a_shared_prefix_is_read_once(monkeypatch, rows, n_tokens_read):
    read = []
    embedding = torch.nn.functional.embedding

    def count(ids, weight):
        read.append(ids.numel())
        return embedding(ids, weight)

    monkeypatch.setattr("fastgpt.generation.engine.F.embedding", count)
    # Prompts as short as these are read by the native decoder, which shares nothing.
    monkeypatch.setattr("fastgpt.generation.native_engine.FEW_ENTRIES", 0)
    Generator(small_model()).generate(rows, 1)
    assert sum(read) == n_tokens_read


def test_a_smaller_context_size_crops_as_the_plain_loop_does():
    model = small_model()
    for context_size in (1, 2, 7, CONTEXT):
        for n_tokens in (1, 5, 20):
            idx = prompt(2, n_tokens)
            want = reference.generate_text_simple(model, idx, 15, context_size)
            assert torch.equal(generate_text_simple(model, idx, 15, context_size), want)


def test_a_seed_leaves_the_global_generator_alone():
    model, idx = small_model(), prompt()
    before = torch.get_rng_state()
    Generator(model).generate(idx, 20, temperature=1.5, seed=11)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pinned_tokens_of_the_book():
    torch.manual_seed(123)
    model = GPTModel(fastgpt.GPT_CONFIG_124M).eval()
    idx = torch.tensor([[15496, 11, 314, 716]])
    want = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
    assert generate_text_simple(model, idx, 10, 1024)[0, 4:].tolist() == want


def test_a_stream_gives_the_steps_of_generate():
    model, idx = small_model(), prompt(3, 4)
    generator = Generator(model)
    options = {"temperature": 2.0, "top_k": 9, "eos_id": 5, "seed": 2}
    steps = list(generator.stream(idx, 25, **options))
    assert all(step.shape == (3, 1) and step.dtype == torch.int64 for step in steps)
    assert torch.equal(torch.cat([idx, *steps], dim=1), generator.generate(idx, 25, **options))


def test_a_row_that_ended_is_filled_with_the_eos_token_and_the_eos_is_not_appended():
    model, idx = small_model(), prompt(4, 5)
    free = Generator(model).generate(idx, 30)
    eos_id = int(free[0, 7])
    got = Generator(model).generate(idx, 30, eos_id=eos_id)
    for row, whole in zip(got[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        end = whole.index(eos_id) if eos_id in whole else len(row)
        assert row == whole[:end] + [eos_id] * (len(row) - end)
    assert any(row[-1] != eos_id for row in got.tolist())


# Past the context.


def test_stop_ends_each_row_when_the_context_is_full():
    model, rows = small_model(), [[1, 2, 3], [4], list(range(CONTEXT - 1)), list(range(CONTEXT))]
    got = Generator(model).generate(rows, 50, overflow="stop")
    want = Generator(model).generate(rows, 50)
    for row, long, ids in zip(got, want, rows, strict=True):
        assert len(row) == CONTEXT
        assert torch.equal(row, long[:CONTEXT]), len(ids)


def test_a_stream_marks_rows_that_stopped_without_an_eos_token():
    steps = list(Generator(small_model()).stream([[1], list(range(CONTEXT - 1))], 4, overflow="stop"))
    assert [int(step[1]) == -1 for step in steps] == [False, True, True, True]


def test_slide_is_exact_up_to_the_context_and_then_reads_the_last_half():
    model, idx = small_model(), prompt(2, 5)
    got = Generator(model).generate(idx, 30, overflow="slide")
    window, want = idx, idx
    for _ in range(30):
        if window.shape[1] > CONTEXT:
            window = window[:, -(CONTEXT // 2) :]
        token = model(window)[:, -1].argmax(-1, keepdim=True)
        window, want = torch.cat([window, token], 1), torch.cat([want, token], 1)
    assert torch.equal(got, want)


def test_slide_treats_each_row_of_a_ragged_list_by_itself():
    generator = Generator(small_model())
    rows = [[7], [1, 2, 3], list(range(CONTEXT))]
    for row, ids in zip(generator.generate(rows, 40, overflow="slide"), rows, strict=True):
        assert torch.equal(row, generator.generate(torch.tensor([ids]), 40, overflow="slide")[0])


def test_a_context_size_beyond_the_models_is_an_index_error_that_names_the_way_out():
    model = small_model()
    with pytest.raises(IndexError, match=rf"pass context_size={CONTEXT}"):
        generate_text_simple(model, prompt(1, 5), 20, 100)
    with pytest.raises(IndexError, match=f"exceeds the model's context of {CONTEXT}"):
        generate(model, prompt(1, 5), 20, 100, eos_id=10**6)


def test_a_context_size_beyond_the_models_is_harmless_while_the_tokens_fit():
    model, idx = small_model(), prompt(1, 5)
    want = reference.generate_text_simple(model, idx, CONTEXT - 4, 100)
    assert torch.equal(generate_text_simple(model, idx, CONTEXT - 4, 100), want)


# Live weights.


def test_an_optimizer_step_changes_the_next_tokens():
    model, idx = small_model(), prompt()
    generator = Generator(model)
    before = generator.generate(idx, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    nn.functional.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    optimizer.step()
    after = generator.generate(idx, 10)
    assert torch.equal(after, GREEDY(model, idx, 10)) and not torch.equal(after, before)


def test_replaced_parameters_and_modules_are_seen():
    model, idx = small_model(), prompt()
    generator = Generator(model)
    generator.generate(idx, 3)
    model.out_head = nn.Linear(SMALL["emb_dim"], SMALL["vocab_size"])
    model.trf_blocks[0].ff.layers[0].weight = nn.Parameter(torch.randn_like(model.trf_blocks[0].ff.layers[0].weight))
    assert torch.equal(generator.generate(idx, 10), GREEDY(model, idx, 10))


def test_a_float64_copy_gives_the_tokens_of_the_converted_model():
    model, idx = small_model(), prompt()
    want = Generator(copy.deepcopy(model).to(torch.float64)).generate(idx, 20)
    assert torch.equal(Generator(model, dtype=torch.float64).generate(idx, 20), want)
    assert model.out_head.weight.dtype == torch.float32


def test_a_float64_copy_follows_the_weights():
    model, idx = small_model(), prompt()
    generator = Generator(model, dtype=torch.float64)
    before = generator.generate(idx, 10)
    with torch.no_grad():
        model.out_head.weight.neg_()
        model.tok_emb.weight = nn.Parameter(model.tok_emb.weight.flip(0))
    after = generator.generate(idx, 10)
    assert not torch.equal(after, before)
    assert torch.equal(after, Generator(copy.deepcopy(model).to(torch.float64)).generate(idx, 10))


def test_an_edit_through_data_needs_refresh_and_gets_it():
    model, idx = small_model(), prompt()
    generator = Generator(model, dtype=torch.float64)
    generator.generate(idx, 2)
    model.out_head.weight.data.neg_()
    generator.refresh()
    assert torch.equal(generator.generate(idx, 10), Generator(copy.deepcopy(model).double()).generate(idx, 10))


def test_a_copy_forgets_weights_that_are_gone():
    model = small_model()
    generator = Generator(model, dtype=torch.float64)
    generator.generate(prompt(), 2)
    count = len(generator._copies._entries)
    model.out_head = nn.Linear(SMALL["emb_dim"], SMALL["vocab_size"], bias=False)
    gc.collect()
    generator.generate(prompt(), 2)
    assert len(generator._copies._entries) == count


# No side effects.


def test_the_mode_of_every_module_is_as_before():
    model = small_model(drop_rate=0.3).train()
    model.trf_blocks[1].eval()
    before = modes(model)
    want = GREEDY(copy.deepcopy(model).eval(), prompt(), 15)
    generator = Generator(model)
    assert torch.equal(generator.generate(prompt(), 15), want)
    assert modes(model) == before
    stream = generator.stream(prompt(), 15)
    next(stream)
    assert modes(model) == before
    stream.close()
    assert modes(model) == before


class Plain(nn.Module):
    """No GPT: the next token is the last one plus 1; fails on token 9."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, idx):
        assert not self.drop.training
        if bool((idx[:, -1] == 9).any()):
            raise RuntimeError("nine")
        return self.drop(nn.functional.one_hot((idx + 1) % 20, 20).float())


def test_an_unknown_module_runs_in_evaluation_mode_and_is_restored_after_an_error_too():
    model = Plain().train()
    generator = Generator(model)
    assert "has no tok_emb" in generator.why_plain
    assert generator.generate(torch.tensor([[3]]), 4).tolist() == [[3, 4, 5, 6, 7]]
    assert modes(model) == [True, True]
    with pytest.raises(RuntimeError, match="nine"):
        generator.generate(torch.tensor([[8]]), 4)
    assert modes(model) == [True, True]


def test_results_serve_a_training_step_afterwards():
    model = small_model()
    ids = Generator(model).generate(prompt(), 5)
    for tokens in (ids, *Generator(model).stream(prompt(), 2), *Generator(model).generate([[1, 2]], 3)[0][None, None]):
        model(tokens).sum().backward()
    assert model.tok_emb.weight.grad is not None
    assert torch.is_grad_enabled() and not ids.is_inference()


def test_the_callers_gradient_mode_is_left_alone_between_the_steps_of_a_stream():
    stream = Generator(small_model()).stream(prompt(), 3)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_the_prompts_are_not_written_to():
    idx = prompt()
    before = idx.clone()
    result = Generator(small_model()).generate(idx, 3)
    result.zero_()
    assert torch.equal(idx, before)


def test_nothing_is_printed(capsys):
    Generator(small_model()).generate(prompt(), 5)
    Generator(lambda idx: torch.zeros(*idx.shape, 4)).generate([[1], [2, 3]], 5)
    assert capsys.readouterr() == ("", "")


# Other models.


def test_any_callable_works_for_batches_and_ragged_prompts():
    generator = Generator(lambda idx: nn.functional.one_hot((idx + 1) % 5, 5).float())
    assert generator.generate(torch.tensor([[0], [3]]), 3).tolist() == [[0, 1, 2, 3], [3, 4, 0, 1]]
    assert [row.tolist() for row in generator.generate([[0], [2, 3]], 2)] == [[0, 1, 2], [2, 3, 4, 0]]
    model = lambda idx: nn.functional.one_hot((idx + 1) % 5, 5).float()  # noqa: E731
    assert generate_text_simple(model, torch.tensor([[0]]), 3, 2).tolist() == [[0, 1, 2, 3]]


def test_dropout_that_is_on_stays_on_in_the_books_functions():
    model, idx = small_model(drop_rate=0.5).train(), prompt()
    torch.manual_seed(1)
    want = reference.generate_text_simple(model, idx, 10, CONTEXT)
    torch.manual_seed(1)
    assert torch.equal(generate_text_simple(model, idx, 10, CONTEXT), want)
    assert not torch.equal(want, GREEDY(copy.deepcopy(model).eval(), idx, 10))


def test_the_books_functions_leave_the_mode_alone():
    for model in (small_model().train(), small_model(drop_rate=0.2).train(), small_model(drop_rate=0.2)):
        before = modes(model)
        generate_text_simple(model, prompt(), 3, CONTEXT)
        generate(model, prompt(), 3, CONTEXT, temperature=1.0)
        assert modes(model) == before


def test_fastgpt_offers_the_function_and_the_class():
    assert fastgpt.generate is generate
    assert fastgpt.generate_text_simple is generate_text_simple
    assert fastgpt.Generator is Generator


class Doubled(nn.Linear):
    """Stands for LoRA: a layer of the reader's own in the place of a Linear."""

    def forward(self, x):
        return 2 * super().forward(x)


class HalvedHead(GPTModel):
    """The reader overrode forward."""

    def forward(self, in_idx):
        return -super().forward(in_idx)


def test_a_readers_own_layer_is_called_and_cached_generation_goes_on():
    model = small_model()
    model.trf_blocks[0].att.W_query = Doubled(SMALL["emb_dim"], SMALL["emb_dim"])
    generator = Generator(model)
    assert generator.why_plain is None
    assert torch.equal(generator.generate(prompt(), 20), GREEDY(model, prompt(), 20))
    assert torch.equal(generate_text_simple(model, prompt(), 20, CONTEXT), GREEDY(model, prompt(), 20))


def test_a_model_that_computes_something_else_runs_plain():
    model = small_model(HalvedHead)
    generator = Generator(model)
    assert "computes something else" in generator.why_plain
    assert torch.equal(generator.generate(prompt(), 20), GREEDY(model, prompt(), 20))
    assert torch.equal(generate_text_simple(model, prompt(), 20, CONTEXT), GREEDY(model, prompt(), 20))


def test_a_mask_that_is_not_causal_runs_plain():
    model = small_model(reference.GPTModel)
    model.trf_blocks[1].att.mask.zero_()
    assert "mask" in Generator(model).why_plain
    assert torch.equal(Generator(model).generate(prompt(), 20), GREEDY(model, prompt(), 20))


def test_hooks_are_run():
    model, seen = small_model(), []
    model.trf_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(Generator(model).generate(prompt(), 4), GREEDY(model, prompt(), 4))
    assert len(seen) == 8


def test_verification_draws_no_random_numbers():
    model = small_model()
    model.trf_blocks[0].att.W_query = Doubled(SMALL["emb_dim"], SMALL["emb_dim"])
    torch.manual_seed(5)
    want = reference.generate(model, prompt(), 10, CONTEXT, temperature=1.0)
    torch.manual_seed(5)
    assert torch.equal(generate(model, prompt(), 10, CONTEXT, temperature=1.0), want)


def test_dataparallel_and_compiled_models_are_unwrapped():
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    assert Generator(compiled).why_plain is None
    assert torch.equal(Generator(compiled).generate(prompt(), 5), GREEDY(model, prompt(), 5))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_backend_gives_the_same_tokens(backend):
    model = small_model()
    with fastgpt.use_backend(backend):
        got = Generator(model).generate([[1, 2, 3], [4]], 20)
    for row, want in zip(got, Generator(model).generate([[1, 2, 3], [4]], 20), strict=True):
        assert torch.equal(row, want)


# The cache.


def test_the_cache_is_no_larger_than_needed_and_grows_by_doubling():
    cache = Cache(2, 1, 3, 4, limit=300, like=torch.empty(0))
    cache.reserve(10, spare=20)
    assert cache.capacity == 30 and cache.keys[1].shape == (1, 3, 30, 4)
    cache.keys[1][:], cache.values[0][:] = 7.0, 8.0
    cache.reserve(31)
    assert cache.capacity == 60
    assert bool((cache.keys[1][:, :, :30] == 7).all()) and bool((cache.values[0][:, :, :30] == 8).all())
    cache.reserve(299)
    assert cache.capacity == 299
    cache.reserve(300, spare=50)
    assert cache.capacity == 300


def test_generation_over_several_growths_of_the_cache_is_exact():
    model = small_model(context_length=600)
    idx = prompt(2, 3)
    want = reference.generate_text_simple(model, idx, 320, 600)
    assert torch.equal(Generator(model).generate(idx, 320), want)


# Edges and errors.


def test_no_new_tokens_give_the_prompts_back():
    generator = Generator(small_model())
    assert torch.equal(generator.generate(prompt(), 0), prompt())
    assert [row.tolist() for row in generator.generate([[1], [2, 3]], 0)] == [[1], [2, 3]]
    assert torch.equal(generate(small_model(), prompt(), 0, CONTEXT), prompt())


def test_an_empty_batch_gives_an_empty_result():
    generator = Generator(small_model())
    assert generator.generate([], 5) == []
    assert generator.generate(torch.zeros(0, 3, dtype=torch.int64), 5).shape == (0, 8)
    assert list(generator.stream([], 5)) == []
    assert generate(small_model(), torch.zeros(0, 3, dtype=torch.int64), 5, CONTEXT).shape == (0, 8)


def test_other_integer_types_are_read_and_int64_comes_back():
    got = Generator(small_model()).generate(prompt().int(), 5)
    assert got.dtype == torch.int64 and torch.equal(got, Generator(small_model()).generate(prompt(), 5))


@pytest.mark.parametrize(
    ("prompts", "error", "text"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), PromptError, "at least one token"),
        ([[1], []], PromptError, "prompt 1 have none"),
        (torch.tensor([1, 2]), PromptError, r"\.unsqueeze\(0\)"),
        (torch.ones(1, 1, 1, dtype=torch.int64), PromptError, r"\(batch, n_tokens\)"),
        ([torch.tensor([[1]])], PromptError, "must be one row"),
        ([1, 2, 3], TypeError, r"write \[ids\]"),
        (torch.tensor([[1.0]]), TypeError, "whole numbers"),
        ([[1.5]], TypeError, "whole numbers"),
        (torch.tensor([[True]]), TypeError, "whole numbers"),
        ("Hello", TypeError, "encoded first"),
        (["Hello"], TypeError, "encode it first"),
        (None, TypeError, "NoneType"),
        (torch.tensor([[1, 2], [3, 67]]), OutOfRangeError, "Token id 67 at position 1 of row 1.*0 to 66"),
        ([[1], [2, -1]], IndexError, "Token id -1 at position 1 of prompt 1"),
        (torch.zeros(1, 13, dtype=torch.int64), IndexError, r"13 tokens.*at most 12.*\[-12:\]"),
        ([[0] * 13], ValueError, "prompt 0 has 13 tokens"),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused_with_what_is_wanted(prompts, error, text):
    generator = Generator(small_model())
    with pytest.raises(error, match=text):
        generator.generate(prompts, 5)
    with pytest.raises(error, match=text):
        generator.stream(prompts, 5)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be 0 or more"),
        ({"max_new_tokens": 2.0}, TypeError, "whole number"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be 0"),
        ({"temperature": "hot"}, TypeError, "must be a number"),
        ({"top_k": 0}, ValueError, "at least 1"),
        ({"top_k": 68}, ValueError, "only 67 tokens"),
        ({"top_k": 1.5}, TypeError, "whole number"),
        ({"top_p": 0.0}, ValueError, "above 0 and at most 1"),
        ({"top_p": 1.1}, ValueError, "above 0 and at most 1"),
        ({"seed": "x"}, TypeError, "whole number"),
        ({"eos_id": 1.0}, TypeError, "whole number"),
        ({"overflow": "crop"}, ValueError, "exact, stop, slide"),
    ],
)
def test_bad_options_are_refused_with_what_is_wanted(options, error, text):
    with pytest.raises(error, match=text):
        Generator(small_model()).generate(prompt(), **{"max_new_tokens": 5, **options})


@pytest.mark.parametrize(
    ("dtype", "text"),
    [("int2", 'bfloat16, "int8" or "int4"; got \'int2\''), (torch.int8, "floating-point dtype"), (8, "got 8")],
)
def test_dtypes_that_are_not_there_name_those_that_are(dtype, text):
    with pytest.raises(ValueError, match=text):
        Generator(small_model(), dtype=dtype)


def test_a_dtype_for_a_model_that_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="Convert the model itself"):
        Generator(Plain(), dtype=torch.bfloat16).generate([[1]], 2)


def test_something_that_is_no_model_is_refused():
    with pytest.raises(TypeError, match="something to call"):
        Generator({"weights": 1})


def test_the_books_functions_refuse_rows_without_a_batch():
    with pytest.raises(PromptError, match="unsqueeze"):
        generate_text_simple(small_model(), torch.tensor([1, 2]), 5, CONTEXT)


def test_the_books_functions_name_an_unknown_token():
    with pytest.raises(IndexError, match="Token id 67"):
        generate_text_simple(small_model(), torch.tensor([[1, 67]]), 5, CONTEXT)
