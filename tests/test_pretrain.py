"""The pretraining path: exact steps, exact resumption, Ctrl-C, and what it tells the user."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.data import RandomBatches, TokenFile, load_story
from fastgpt.model import GPTModel
from fastgpt.tokenizer import ByteTokenizer
from fastgpt.training import (
    BarReporter,
    DivergedError,
    LineReporter,
    PretrainResult,
    PretrainSettings,
    Reporter,
    make_adamw,
    pretrain,
    resume,
    terminal_reporter,
)
from fastgpt.training.corpus import validation_batches
from fastgpt.training.interrupt import StopRequest
from fastgpt.training.progress import duration
from fastgpt.weights import CheckpointError, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = {"context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0, "qkv_bias": False}


def settings(**changes) -> PretrainSettings:
    usual = {"tokenizer": "byte", "steps": 12, "eval_every": 4, "eval_batches": 4, "batch_size": 4, "warmup_steps": 3}
    return PretrainSettings(**{"model": CFG, **usual, **changes})


class KillAt(Reporter):
    """Sends this process a signal once some steps are done."""

    def __init__(self, step: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.at, self.number, self.times = step, number, times
        self.messages: list[str] = []

    def step(self, step: int, loss, lr: float) -> None:
        if step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def message(self, text: str) -> None:
        self.messages.append(text)


def assert_same_run(got: PretrainResult, want: PretrainResult) -> None:
    assert got.losses == want.losses
    assert got.evaluations == want.evaluations
    for (name, a), b in zip(got.model.named_parameters(), want.model.parameters(), strict=True):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------------------------------------------------- steps


def test_pretrain_follows_the_written_out_loop_exactly():
    result = pretrain(settings(grad_accumulation=2, grad_clip=0.5))
    tokens = torch.tensor(ByteTokenizer().encode(load_story()))
    first_val = int(len(tokens) * 0.9)
    torch.manual_seed(123)
    model = GPTModel({**CFG, "vocab_size": 257})
    optimizer = make_adamw(model, 1.0, 0.1)
    batches = RandomBatches(tokens, 4, 16, seed=123, stop=first_val)
    losses = []
    for step in range(12):
        lr = 1e-4 + step * (1e-3 - 1e-4) / 3
        if step >= 3:
            lr = 1e-4 + (1e-3 - 1e-4) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 3) / 9)).item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        halves = []
        for _ in range(2):
            x, y = next(batches)
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            (loss / 2).backward()
            halves.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(sum(halves) / 2)
    assert result.losses == pytest.approx(losses, rel=2e-6)
    assert [row.train_loss for row in result.evaluations] == pytest.approx(
        [sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)], rel=2e-6
    )
    assert [row.tokens_seen for row in result.evaluations] == [4 * 128, 8 * 128, 12 * 128]


def test_validation_loss_over_everything_is_the_mean_over_each_token():
    result = pretrain(settings(model=CFG | {"drop_rate": 0.3}, eval_batches=None))
    tokens = torch.tensor(ByteTokenizer().encode(load_story()))
    val = tokens[int(len(tokens) * 0.9) :]
    model = result.model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(val) - 1, 16):
            x, y = val[start : start + 16], val[start + 1 : start + 17]
            total += torch.nn.functional.cross_entropy(model(x[None, : len(y)])[0], y, reduction="sum").item()
    assert result.evaluations[-1].val_loss == pytest.approx(total / (len(val) - 1), rel=1e-5)


@pytest.mark.parametrize("n_tokens", [2, 3, 16, 17, 18, 33, 100, 129])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_batches_predict_each_token_once(n_tokens: int, batch_size: int):
    tokens = torch.arange(50 + n_tokens)
    batches = list(validation_batches(tokens, 50, 16, batch_size, None))
    assert torch.cat([x.flatten() for x, _ in batches]).tolist() == list(range(50, 49 + n_tokens))
    assert torch.cat([y.flatten() for _, y in batches]).tolist() == list(range(51, 50 + n_tokens))
    assert all(len(x) <= batch_size and x.shape == y.shape for x, y in batches)


def test_limited_validation_is_spread_over_the_whole_part():
    tokens = torch.arange(1 + 16 * 40)
    starts = [x[0, 0].item() // 16 for x, _ in validation_batches(tokens, 0, 16, 1, 4)]
    assert starts == [0, 10, 20, 30]


def test_an_epoch_is_as_many_tokens_as_the_training_part_has():
    result = pretrain(settings(steps=None, epochs=0.5))
    n_train = int(len(load_story()) * 0.9)
    assert result.step == result.total_steps == round(0.5 * n_train / (4 * 16))


def test_a_gpt_learns_the_story():
    result = pretrain(settings(steps=150, eval_every=50, lr=1e-2, eval_batches=None))
    assert result.evaluations[0].val_loss > result.evaluations[-1].val_loss
    # A model that knew only how often each byte occurs would have 3.1.
    assert result.best_val_loss < 2.9


def test_bfloat16_trains_close_to_float32():
    want, got = pretrain(settings()), pretrain(settings(dtype="bfloat16"))
    assert next(got.model.parameters()).dtype == torch.float32
    # bfloat16 keeps 8 bits: a loss near 6 moves by about 1/256.
    assert got.losses == pytest.approx(want.losses, abs=0.03)
    assert got.losses != want.losses


def test_a_run_leaves_torchs_random_numbers_as_they_were_and_does_not_depend_on_them():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = pretrain(settings(model=CFG | {"drop_rate": 0.2}, sample_prompt="The"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert_same_run(pretrain(settings(model=CFG | {"drop_rate": 0.2})), first)


def test_a_loss_that_is_no_number_ends_the_run_with_advice(tmp_path: Path):
    with pytest.raises(DivergedError, match=r"training loss is (nan|inf) by step 4. A lower lr \(it is 1e\+30\)"):
        pretrain(settings(lr=1e30, min_lr=1e30, grad_clip=0.0, out_dir=str(tmp_path)))


# --------------------------------------------------------------------------------------------- stopping, resuming

NOISY = {"model": CFG | {"drop_rate": 0.1}, "sample_prompt": "The tide", "sample_tokens": 3, "grad_accumulation": 2}


@pytest.fixture(scope="module")
def uninterrupted() -> PretrainResult:
    return pretrain(settings(**NOISY))


@pytest.mark.parametrize("step", [1, 4, 6, 11])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_equals_one_that_was_not(
    step: int, number: int, uninterrupted: PretrainResult, tmp_path: Path
):
    reporter = KillAt(step, number)
    part = pretrain(settings(out_dir=str(tmp_path), **NOISY), reporter=reporter)
    assert part.interrupted and part.step == step and part.losses == uninterrupted.losses[:step]
    assert reporter.messages == [
        f"Stopped after step {step} of 12, saved; go on with: fastgpt train --resume {tmp_path}"
    ]
    result = resume(tmp_path)
    assert not result.interrupted
    assert_same_run(result, uninterrupted)


def test_a_run_may_stop_many_times(uninterrupted: PretrainResult, tmp_path: Path):
    pretrain(settings(out_dir=str(tmp_path), **NOISY), reporter=KillAt(2))
    for step in (3, 8, 9):
        assert resume(tmp_path, reporter=KillAt(step)).step == step
    assert_same_run(resume(tmp_path), uninterrupted)


def test_a_second_ctrl_c_aborts_and_leaves_the_last_checkpoint(uninterrupted: PretrainResult, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(out_dir=str(tmp_path), **NOISY), reporter=KillAt(7, times=2))
    assert not list(tmp_path.glob(".*"))
    assert_same_run(resume(tmp_path), uninterrupted)


def test_signal_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.made
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


SCRIPT = """
import json, sys
from fastgpt.training import PretrainSettings, pretrain, terminal_reporter
result = pretrain(PretrainSettings(**json.loads(sys.argv[1])), reporter=terminal_reporter())
print(result.step, result.interrupted)
"""


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent with POSIX signals")
def test_ctrl_c_from_outside_saves_and_the_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    long = settings(steps=3000, eval_every=1000, eval_batches=1).to_dict()
    argument = json.dumps(long | {"out_dir": str(tmp_path / "run"), "eval_every": 5})
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seen = child.stderr.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert seen.startswith("step 5/3000: training loss"), seen + err
    assert child.returncode == 0 and out.split()[1] == "True", err
    step = int(out.split()[0])
    assert f"Stopped after step {step} of 3000, saved; go on with: fastgpt train --resume" in err
    goal = step + 5
    resumed = resume(tmp_path / "run", reporter=KillAt(goal))
    direct = pretrain(PretrainSettings(**long | {"eval_every": 5}), reporter=KillAt(goal))
    assert resumed.step == goal
    assert_same_run(resumed, direct)


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path):
    result = pretrain(settings(out_dir=str(tmp_path)))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert_same_run(resume(tmp_path), result)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path):
    pretrain(settings(steps=1, out_dir=str(tmp_path)))
    with pytest.raises(FileExistsError, match="holds a run already. Go on with it .*--resume"):
        pretrain(settings(steps=1, out_dir=str(tmp_path)))


def test_a_run_survives_a_changed_text_and_a_moved_folder(tmp_path: Path):
    (tmp_path / "text.txt").write_text(load_story())
    want = pretrain(settings())
    pretrain(settings(data=str(tmp_path / "text.txt"), out_dir=str(tmp_path / "a")), reporter=KillAt(5))
    (tmp_path / "text.txt").unlink()
    (tmp_path / "a").rename(tmp_path / "b")
    assert_same_run(resume(tmp_path / "b"), want)


def test_other_tokens_are_refused(tmp_path: Path):
    pretrain(settings(out_dir=str(tmp_path)), reporter=KillAt(5))
    TokenFile.write(tmp_path / "tokens.bin", load_story()[::-1], ByteTokenizer())
    with pytest.raises(CheckpointError, match="not those that the run in .* began with"):
        resume(tmp_path)


def test_a_damaged_checkpoint_is_one_clear_error_and_the_best_weights_remain(tmp_path: Path):
    result = pretrain(settings(out_dir=str(tmp_path)))
    data = bytearray((tmp_path / "last.safetensors").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "last.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="last.safetensors is damaged: .* does not match its checksum"):
        resume(tmp_path)
    model, info = load_model(tmp_path / "best.safetensors")
    assert info["tokenizer"] == "byte" and info["step"] == result.step


def test_best_holds_the_weights_of_the_lowest_validation_loss(tmp_path: Path):
    # The rate grows until the loss goes up again.
    worse = {"steps": 24, "eval_every": 3, "lr": 0.01, "min_lr": 3.0, "warmup_steps": 0}
    result = pretrain(settings(**worse, out_dir=str(tmp_path)))
    best = min(result.evaluations, key=lambda row: row.val_loss)
    model, info = load_model(tmp_path / "best.safetensors")
    assert best.step < result.step and info["step"] == best.step
    again = pretrain(settings(**worse), reporter=KillAt(best.step))
    for a, b in zip(model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ data and settings


def test_a_token_file_trains_as_its_text_does(tmp_path: Path):
    TokenFile.write(tmp_path / "t.bin", load_story(), ByteTokenizer())
    assert_same_run(pretrain(settings(data=str(tmp_path / "t.bin"), tokenizer="auto")), pretrain(settings()))
    with pytest.raises(ValueError, match="was encoded with the tokenizer 'byte', not 'story'"):
        pretrain(settings(data=str(tmp_path / "t.bin"), tokenizer="story"))


def test_a_text_that_is_not_utf_8_is_named_with_line_and_byte(tmp_path: Path):
    (tmp_path / "bad.txt").write_bytes(b"one\ntw\xe4\n")
    with pytest.raises(ValueError, match="bad.txt is not UTF-8: line 2, byte 3"):
        pretrain(settings(data=str(tmp_path / "bad.txt")))


@pytest.mark.parametrize(
    ("text", "error"), [("ab", "too few to split"), ("abcdefghijklmnopq", "Too few tokens for one")]
)
def test_a_text_that_is_too_short_is_refused(text: str, error: str, tmp_path: Path):
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(ValueError, match=error):
        pretrain(settings(data=str(tmp_path / "short.txt")))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"steps": None}, "Give steps or epochs, one of them; got steps=None, epochs=None"),
        ({"epochs": 1.0}, "Give steps or epochs"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"eval_every": 2.5}, "eval_every must be a whole number"),
        ({"lr": float("nan")}, "lr must be a number of at least 0; got nan"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1; got 1.0"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16; got 'float16'"),
        ({"seed": -1}, "seed must be from 0"),
        ({"context": 32}, "context is 32, but the model's context_length is 16"),
        ({"model": CFG | {"vocab_size": 100}}, "has 257 ids, but the model's vocab_size is 100"),
        ({"model": CFG | {"n_heads": 3}}, "emb_dim must be divisible by n_heads"),
        ({"tokenizer": "gpt5"}, "No tokenizer is called 'gpt5'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(change: dict, error: str):
    with pytest.raises(ValueError, match=error):
        pretrain(settings(**change))


def test_settings_survive_json():
    one = settings(betas=(0.8, 0.9), sample_prompt="ü")
    assert PretrainSettings.from_dict(json.loads(one.to_json())) == one
    with pytest.raises(ValueError, match="Unknown settings: colour. Were they written by a newer fastgpt"):
        PretrainSettings.from_dict(one.to_dict() | {"colour": 1})


def test_the_folder_holds_what_the_documentation_says(tmp_path: Path):
    pytest.importorskip("matplotlib")
    pretrain(settings(out_dir=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {
        "settings.json",
        "tokens.bin",
        "last.safetensors",
        "best.safetensors",
        "loss.png",
    }
    assert json.loads((tmp_path / "settings.json").read_text())["model"]["vocab_size"] == 257


# --------------------------------------------------------------------------------------------------------- reports


def test_a_library_call_is_silent(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    pretrain(settings(out_dir=str(tmp_path), sample_prompt="The"))
    assert capfd.readouterr() == ("", "")


def test_away_from_a_terminal_there_are_plain_lines():
    stream = io.StringIO()
    reporter = terminal_reporter(stream)
    assert isinstance(reporter, LineReporter)
    result = pretrain(settings(sample_prompt="The", sample_tokens=2), reporter=reporter)
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("step")] == [
        f"step {row.step}/12: training loss {row.train_loss:.3f}, validation loss {row.val_loss:.3f}, "
        f"{row.tokens_seen:,} tokens"
        for row in result.evaluations
    ]
    assert sum(line.startswith("  'The") for line in lines) == 3


def test_on_a_terminal_there_is_a_bar_with_speed_and_loss(tmp_path: Path):
    with (tmp_path / "screen").open("w+") as stream:
        stream.isatty = lambda: True
        reporter = terminal_reporter(stream)
        assert isinstance(reporter, BarReporter)
        pretrain(settings(out_dir=str(tmp_path / "run")), reporter=reporter)
        stream.seek(0)
        screen = stream.read()
    assert "encoding" in screen and "step 12/12: training loss" in screen
    assert "tok/s" in screen and "loss " in screen and "lr 1" in screen


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (7260, "2 h 01 min")])
def test_durations_read_well(seconds: float, text: str):
    assert duration(seconds) == text
