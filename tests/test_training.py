"""Chapter 5's and appendix D's training functions against the formulas and loops that the book describes."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from fastgpt import reference
from fastgpt.book import appendix_d, ch05
from fastgpt.data import create_dataloader_v1, load_story
from fastgpt.model import GPTModel
from fastgpt.tokenizer import ByteTokenizer, get_tokenizer, text_to_token_ids, token_ids_to_text
from fastgpt.training import (
    WarmupCosine,
    calc_loss_batch,
    calc_loss_loader,
    evaluate_model,
    find_highest_gradient,
    generate_and_print_sample,
    make_adamw,
    plot_losses,
    print_sampled_tokens,
    save_loss_plot,
    softmax_with_temperature,
    terminal_plot,
    train_model,
    train_model_simple,
)

CFG = {
    "vocab_size": 257,
    "context_length": 12,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
TOKENIZER = ByteTokenizer()
pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(kind: type = GPTModel, **changes: float) -> torch.nn.Module:
    torch.manual_seed(123)
    return kind(CFG | changes)


def loader(first: int, last: int, *, batch_size: int = 2, shuffle: bool = False) -> DataLoader:
    return create_dataloader_v1(
        load_story()[first:last],
        batch_size=batch_size,
        max_length=12,
        stride=12,
        shuffle=shuffle,
        drop_last=True,
        tokenizer=TOKENIZER,
    )


def adamw(model: torch.nn.Module, lr: float = 5e-3) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


# ---------------------------------------------------------------------------------------------------- losses


def test_batch_loss_is_the_mean_negative_log_probability_of_the_targets():
    model = make_model()
    inputs, targets = next(iter(loader(0, 200)))
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(inputs).double(), dim=-1)
        picked = torch.tensor([[log_probabilities[b, t, targets[b, t]] for t in range(12)] for b in range(2)])
        torch.testing.assert_close(calc_loss_batch(inputs, targets, model, "cpu").double(), -picked.mean())


def test_ignored_targets_do_not_count_in_the_batch_loss():
    model = make_model()
    inputs, targets = next(iter(loader(0, 200)))
    half = targets.clone()
    half[:, 6:] = -100
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(inputs)[:, :6].flatten(0, 1), targets[:, :6].flatten())
        torch.testing.assert_close(calc_loss_batch(inputs, half, model, "cpu"), want)


def test_a_batch_without_targets_that_count_has_loss_nan():
    inputs, targets = next(iter(loader(0, 200)))
    assert math.isnan(calc_loss_batch(inputs, torch.full_like(targets, -100), make_model(), "cpu").item())


def test_loader_loss_is_the_mean_of_batch_means_to_the_last_bit():
    model = make_model()
    batches = loader(0, 600)
    want = sum(calc_loss_batch(x, y, model, "cpu").item() for x, y in batches) / len(batches)
    assert calc_loss_loader(batches, model, "cpu") == want


@pytest.mark.parametrize(("asked", "read"), [(1, 1), (3, 3), (10_000, None)])
def test_loader_loss_reads_at_most_the_batches_asked_for(asked: int, read: int | None):
    model = make_model()
    batches = loader(0, 600)
    losses = [calc_loss_batch(x, y, model, "cpu").item() for x, y in batches][:read]
    assert calc_loss_loader(batches, model, "cpu", num_batches=asked) == sum(losses) / len(losses)


def test_loss_of_an_empty_loader_is_nan():
    assert math.isnan(calc_loss_loader([], make_model(), "cpu"))


def test_loader_loss_is_a_python_float_and_keeps_the_mode():
    model = make_model().eval()
    assert type(calc_loss_loader(loader(0, 200), model, "cpu")) is float
    assert not model.training


def test_evaluate_model_ignores_dropout_and_ends_in_training_mode():
    model = make_model(drop_rate=0.5)
    train, val = loader(0, 400), loader(400, 600)
    with torch.no_grad():
        want = tuple(calc_loss_loader(batches, model.eval(), "cpu", 2) for batches in (train, val))
    assert evaluate_model(model, train, val, "cpu", 2) == want
    assert model.training


# ------------------------------------------------------------------------------------------------------ loops


def naive_train(model, train, val, optimizer, epochs, eval_freq, eval_iter, lrs=None, clip_from=None):
    """The loop as the book tells it, written out, with nothing of fastgpt.training."""

    def loss_of(x, y):
        logits = model(x)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    rows, seen, step = [], 0, -1
    for _ in range(epochs):
        model.train()
        for x, y in train:
            step += 1
            optimizer.zero_grad()
            if lrs is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lrs[step]
            loss_of(x, y).backward()
            if clip_from is not None and step >= clip_from:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += x.numel()
            if step % eval_freq == 0:
                model.eval()
                with torch.no_grad():
                    means = [
                        sum(loss_of(*batch).item() for _, batch in zip(range(eval_iter), data, strict=False))
                        / eval_iter
                        for data in (train, val)
                    ]
                model.train()
                rows.append((*means, seen))
    return tuple(map(list, zip(*rows, strict=True)))


def test_train_model_simple_follows_the_written_out_loop_exactly():
    train, val = loader(0, 700), loader(700, 900)
    model, twin = (make_model(reference.GPTModel) for _ in range(2))
    got = train_model_simple(model, train, val, adamw(model), "cpu", 2, 5, 3, "The tide", TOKENIZER)
    assert got == naive_train(twin, train, val, adamw(twin), 2, 5, 3)


def test_losses_of_our_model_and_of_the_reference_agree():
    train, val = loader(0, 700), loader(700, 900)
    model, twin = make_model(), make_model(reference.GPTModel)
    got = train_model_simple(model, train, val, adamw(model), "cpu", 2, 5, 3, "The tide", TOKENIZER)
    want = train_model_simple(twin, train, val, adamw(twin), "cpu", 2, 5, 3, "The tide", TOKENIZER)
    assert got[2] == want[2]
    # Rounding of the fused ops, carried through 58 steps of AdamW.
    torch.testing.assert_close(torch.tensor(got[:2]), torch.tensor(want[:2]), rtol=1e-4, atol=1e-4)


def test_shuffled_batches_come_in_the_order_of_the_written_out_loop():
    val = loader(700, 900)
    model, twin = (make_model(reference.GPTModel) for _ in range(2))
    torch.manual_seed(5)
    got = train_model_simple(model, loader(0, 700, shuffle=True), val, adamw(model), "cpu", 2, 4, 2, "A", TOKENIZER)
    torch.manual_seed(5)
    assert got == naive_train(twin, loader(0, 700, shuffle=True), val, adamw(twin), 2, 4, 2)


def test_one_evaluation_every_five_steps_from_step_0_makes_39_of_192_steps():
    # 4,612 tokens in windows of 12, two a batch: the numbers of the book's own test.
    train = create_dataloader_v1("x" * (384 * 12 + 1), 2, 12, 12, tokenizer=TOKENIZER)
    assert len(train) == 192
    model = make_model()
    losses, _, seen = train_model_simple(model, train, train, adamw(model), "cpu", 1, 5, 1, "x", TOKENIZER)
    assert len(losses) == 39
    assert seen[0] == 24 and seen[-1] == 24 * 191


def test_stdout_holds_the_books_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    model = make_model()
    train, val = loader(0, 300), loader(300, 500)
    losses, val_losses, _ = train_model_simple(model, train, val, adamw(model), "cpu", 2, 7, 1, "The tide", TOKENIZER)
    out, err = capsys.readouterr()
    want, row = [], 0
    for epoch in (1, 2):
        for step in range(12 * (epoch - 1), 12 * epoch):
            if step % 7 == 0:
                want.append(
                    f"Ep {epoch} (Step {step:06d}): Train loss {losses[row]:.3f}, Val loss {val_losses[row]:.3f}"
                )
                row += 1
        want.append(None)
    lines = out.split("\n")
    assert len(train) == 12 and lines[-1] == "" and len(lines) == len(want) + 1
    for line, expected in zip(lines, want, strict=False):
        assert line == expected if expected else line.startswith("The tide")
    assert err == ""


def test_train_model_follows_the_written_out_loop_with_schedule_and_clipping(capsys: pytest.CaptureFixture[str]):
    train, val = loader(0, 700), loader(700, 900)
    model, twin = (make_model(reference.GPTModel) for _ in range(2))
    *got, lrs = train_model(model, train, val, adamw(model), "cpu", 2, 5, 3, "A", TOKENIZER, 10, 1e-5, 1e-4)
    total = 2 * len(train)
    want_lrs = [1e-5 + i * (5e-3 - 1e-5) / 10 for i in range(10)] + [
        1e-4 + (5e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (i - 10) / (total - 10))) for i in range(10, total)
    ]
    assert lrs == pytest.approx(want_lrs, rel=1e-12)
    assert tuple(got) == naive_train(twin, train, val, adamw(twin), 2, 5, 3, lrs, clip_from=10)
    assert re.match(r"Ep 1 \(Iter 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}\n", capsys.readouterr().out)


@pytest.mark.parametrize(("orig_book_version", "first"), [(False, 3), (True, 4)])
def test_clipping_begins_with_the_first_step_after_warmup_or_one_later_as_printed(
    orig_book_version: bool, first: int, monkeypatch: pytest.MonkeyPatch
):
    clipped = []
    model = make_model()
    optimizer = adamw(model)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: clipped.append(len(lrs_seen)))
    lrs_seen: list[float] = []
    step = optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda: (lrs_seen.append(optimizer.param_groups[0]["lr"]), step()))
    train = loader(0, 200)
    train_model(model, train, train, optimizer, "cpu", 1, 99, 1, "A", TOKENIZER, 3, orig_book_version=orig_book_version)
    assert clipped == list(range(first, len(train)))


def test_train_model_without_warmup_begins_at_the_peak():
    model = make_model()
    train = loader(0, 200)
    lrs = train_model(model, train, train, adamw(model), "cpu", 1, 99, 1, "A", TOKENIZER, warmup_steps=0)[3]
    assert lrs[0] == 5e-3


def test_highest_gradient_is_the_largest_signed_value():
    model = make_model()
    assert find_highest_gradient(model) is None
    calc_loss_batch(*next(iter(loader(0, 200))), model, "cpu").backward()
    want = max(parameter.grad.max().item() for parameter in model.parameters())
    assert find_highest_gradient(model).item() == want


# ----------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("kind", [GPTModel, reference.GPTModel])
def test_the_printed_sample_is_the_plain_loops_past_the_context_too(kind: type, capsys: pytest.CaptureFixture[str]):
    model = make_model(kind)
    generate_and_print_sample(model, TOKENIZER, "cpu", "The tide")
    plain = make_model(reference.GPTModel).eval()
    ids = reference.generate_text_simple(plain, text_to_token_ids("The tide", TOKENIZER), 50, 12)
    assert capsys.readouterr().out == token_ids_to_text(ids, TOKENIZER).replace("\n", " ") + "\n"
    assert model.training


def test_the_sample_sees_the_newest_weights(capsys: pytest.CaptureFixture[str]):
    model = make_model()
    generate_and_print_sample(model, TOKENIZER, "cpu", "The tide")
    with torch.no_grad():
        for parameter in model.out_head.parameters():
            parameter.zero_()
    capsys.readouterr()
    generate_and_print_sample(model, TOKENIZER, "cpu", "The tide")
    assert capsys.readouterr().out == "The tide" + "\0" * 50 + "\n"


def test_temperature_divides_the_logits():
    logits = torch.tensor([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])
    got = softmax_with_temperature(logits, 0.1)
    torch.testing.assert_close(got, torch.exp(logits * 10) / torch.exp(logits * 10).sum())
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        softmax_with_temperature(logits, 0)


def test_sampled_tokens_are_counted_as_in_the_notebook(capsys: pytest.CaptureFixture[str]):
    logits = torch.tensor([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])
    print_sampled_tokens(torch.softmax(logits, dim=0))
    assert capsys.readouterr().out.splitlines() == [
        "73 x closer",
        "0 x every",
        "0 x effort",
        "582 x forward",
        "2 x inches",
        "0 x moves",
        "0 x pizza",
        "343 x toward",
        "0 x you",
    ]


# ------------------------------------------------------------------------------------- schedule, optimizer, plots


def test_schedule_rises_straight_and_falls_along_half_a_cosine():
    schedule = WarmupCosine(peak_lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=24, initial_lr=0.2)
    assert [schedule.at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule.at(14) == pytest.approx((1.0 + 0.1) / 2)
    assert schedule.at(24) == pytest.approx(0.1)
    falling = [schedule.at(step) for step in range(4, 25)]
    assert falling == sorted(falling, reverse=True)


def test_schedule_with_nothing_but_warmup_never_divides_by_zero():
    schedule = WarmupCosine(peak_lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=4)
    assert [schedule.at(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 0.1]


def test_adamw_decays_matrices_only():
    model = make_model()
    optimizer = make_adamw(model, lr=1.0, weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.5 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


def test_fused_adamw_takes_the_steps_of_the_plain_one():
    model, twin = make_model(), make_model()
    fused = make_adamw(model, lr=1e-3, weight_decay=0.1)
    plain = make_adamw(twin, lr=1e-3, weight_decay=0.1)
    assert fused.defaults["fused"]
    for group in plain.param_groups:
        group["fused"] = False
    for net, optimizer in ((model, fused), (twin, plain)):
        for inputs, targets in loader(0, 200):
            optimizer.zero_grad()
            calc_loss_batch(inputs, targets, net, "cpu").backward()
            optimizer.step()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_adamw_has_its_moments_before_the_first_step_and_takes_the_usual_one():
    model, twin = make_model(), make_model()
    ready, usual = make_adamw(model, lr=1e-3, weight_decay=0.1), make_adamw(twin, lr=1e-3, weight_decay=0.1)
    usual.state.clear()
    for net, optimizer in ((model, ready), (twin, usual)):
        inputs, targets = next(iter(loader(0, 200)))
        calc_loss_batch(inputs, targets, net, "cpu").backward()
        addresses = {id(moment) for state in optimizer.state.values() for moment in state.values()}
        optimizer.step()
        made = {id(moment) for state in optimizer.state.values() for moment in state.values()}
        assert (made == addresses) is (optimizer is ready)
    assert all(torch.equal(got, want) for got, want in zip(model.parameters(), twin.parameters(), strict=True))


def test_plot_losses_saves_the_books_figure(tmp_path, monkeypatch: pytest.MonkeyPatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    plot_losses([0, 1, 2], [0, 10, 20], [3.0, 2.0, 1.0], [3.1, 2.5, 2.0])
    by_epoch, by_tokens = figures[0].axes
    assert [list(line.get_ydata()) for line in by_epoch.lines] == [[3.0, 2.0, 1.0], [3.1, 2.5, 2.0]]
    assert list(by_tokens.lines[0].get_xdata()) == [0, 10, 20]
    assert (tmp_path / "loss-plot.pdf").read_bytes().startswith(b"%PDF")
    plt.close("all")


def test_without_matplotlib_the_book_function_names_the_remedy_and_the_picture_is_left_out():
    script = """
import sys
sys.modules["matplotlib"] = None
from fastgpt.training import plot_losses, save_loss_plot
assert save_loss_plot("x.png", [], []) is None
plot_losses([0], [0], [1.0], [1.0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.endswith('which is not installed: pip install "fastgpt[book]"\n')


def test_the_loss_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = save_loss_plot(tmp_path / "loss.png", [(1, 3.0), (2, 2.0)], [(2, 2.5)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_terminal_plot_puts_each_loss_on_its_row():
    train = [(step, 5.0 - step) for step in range(5)]
    lines = terminal_plot(train, [(4, 5.0)], width=5, height=5, ascii_only=True).split("\n")
    assert [line[6:] for line in lines[:5]] == [".   o", " .", "  .", "   .", "    ."]
    assert lines[0].startswith("5.00") and lines[4].startswith("1.00")
    assert lines[6].split()[:2] == ["0", "4"]


@pytest.mark.parametrize("curve", [[], [(1, math.nan)], [(1, 2.0)], [(1, 2.0), (2, 2.0)]])
def test_the_terminal_plot_takes_any_curve(curve: list[tuple[float, float]]):
    assert ("2.00" in terminal_plot(curve, [])) == any(loss == 2.0 for _, loss in curve)


# ----------------------------------------------------------------------------------------------------- the book


def test_every_name_of_chapter_5_and_appendix_d_is_there():
    names = """text_to_token_ids token_ids_to_text calc_loss_batch calc_loss_loader evaluate_model train_model_simple
        generate_and_print_sample generate assign load_weights_into_gpt download_and_load_gpt2 download_file
        load_gpt2_params_from_tf_ckpt plot_losses print_sampled_tokens softmax_with_temperature"""
    assert all(callable(getattr(ch05, name)) for name in names.split())
    assert callable(appendix_d.find_highest_gradient) and callable(appendix_d.train_model)


def test_an_epoch_over_the_verdict_is_evaluated_39_times(shared_data, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(shared_data / "gpt2_bpe"))
    text = (shared_data / "the-verdict.txt").read_text("utf-8")
    split = int(0.9 * len(text))
    train = create_dataloader_v1(text[:split], batch_size=2, max_length=12, stride=12)
    val = create_dataloader_v1(text[split:], batch_size=2, max_length=12, stride=12, shuffle=False, drop_last=False)
    model = make_model(vocab_size=50257, emb_dim=8)
    losses = train_model_simple(
        model, train, val, adamw(model, 5e-4), "cpu", 1, 5, 1, "Every effort moves you", get_tokenizer("gpt2")
    )[0]
    assert len(losses) == 39
    assert losses[-1] < losses[0]
