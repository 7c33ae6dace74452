"""The command line as a person meets it: first screen, help, a whole run, resumption, errors in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgpt import Generator, cli
from fastgpt.commands.generate import open_model

TINY = ["--size", "tiny", "--batch-size", "2", "--context", "16", "--tokenizer", "byte", "--eval-every", "5"]


@pytest.fixture(scope="module", autouse=True)
def one_thread_everywhere():
    """Models this small gain nothing from a second thread, here and in the processes that the tests start."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS")
    if variable is not None:
        os.environ["OMP_NUM_THREADS"] = variable


def fastgpt(*args: object, stdin: str | None = None, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastgpt", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of a short finished run."""
    folder = tmp_path_factory.mktemp("runs") / "story"
    assert cli.main(["train", "--out", str(folder), "--steps", "10", *TINY]) == 0
    return folder


def losses_of(folder: Path) -> list[dict]:
    from fastgpt.training.checkpoint import read_info

    return read_info(folder / "last.safetensors")["evaluations"]


def test_no_command_shows_the_first_screen(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in out
    assert "first steps" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_teaches_every_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert name in capsys.readouterr().out


def test_help_does_not_import_torch():
    code = "import sys; from fastgpt import cli; cli.make_parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info_names_every_op_and_what_runs_it(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for op in ("attention", "decode_attention", "layer_norm", "gelu"):
        assert re.search(rf"^{op} +cpu +float32 +\w+", out, re.M)


def test_a_run_leaves_checkpoints_settings_and_a_plot(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"last.safetensors", "best.safetensors", "settings.json", "tokens.bin"} <= names
    assert json.loads((trained / "settings.json").read_text())["steps"] == 10
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_shows_the_curve_and_the_next_command(tmp_path, capsys):
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--steps", "5", *TINY]) == 0
    out = capsys.readouterr().out
    assert "validation loss" in out and "fastgpt generate --model" in out and "●" in out


def test_output_that_is_no_terminal_gets_plain_lines(tmp_path):
    done = fastgpt("train", "--out", tmp_path / "run", "--steps", "5", *TINY)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    assert "step 5/5: training loss" in done.stderr


def test_generate_streams_the_prompt_and_its_continuation(trained, capsys):
    args = ["generate", "--model", str(trained), "--prompt", "The tide", "--tokens", "12", "--seed", "3"]
    assert cli.main(args) == 0
    first = capsys.readouterr().out
    assert cli.main(args) == 0
    assert capsys.readouterr().out == first
    assert first.startswith("The tide") and len(first) > len("The tide\n")


@pytest.mark.parametrize(
    ("dtype", "kept"), [(None, None), ("bfloat16", None), ("int8", "float32"), ("int4", None), (None, "int8")]
)
def test_generate_takes_the_dtypes_of_weights_and_cache(trained, capsys, dtype, kept):
    args = ["generate", "--model", str(trained), "--prompt", "The tide", "--tokens", "9", "--temperature", "0"]
    options = [*(["--dtype", dtype] if dtype else []), *(["--cache-dtype", kept] if kept else [])]
    assert cli.main([*args, *options]) == 0
    model, tokenizer = open_model(trained)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    prompt = torch.tensor([tokenizer.encode("The tide")])
    generator = Generator(model, dtypes.get(dtype, dtype), cache_dtype=dtypes.get(kept, kept))
    ids = generator.generate(prompt, 9, eos_id=tokenizer.eot_token)
    assert capsys.readouterr().out == tokenizer.decode(ids[0].tolist()) + "\n"


def test_generate_reads_the_prompt_from_standard_input(trained):
    done = fastgpt("generate", "--model", trained, "--prompt", "-", "--tokens", "3", "--stats", stdin="Once")
    assert done.returncode == 0 and done.stdout.startswith("Once")
    assert "tokens/s" in done.stderr


def test_ctrl_c_saves_and_resuming_gives_the_losses_of_an_unbroken_run(tmp_path):
    args = ["--steps", "60", *TINY, "--seed", "5"]
    assert cli.main(["train", "--out", str(tmp_path / "whole"), *args]) == 0
    broken = tmp_path / "broken"
    command = [sys.executable, "-m", "fastgpt", "train", "--out", str(broken), *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    # The first evaluation is the sign that training is under way.
    assert process.stderr.readline()
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) in (0, 130)
    if process.returncode == 130:
        assert f"fastgpt train --resume {broken}" in rest
        assert cli.main(["train", "--resume", str(broken)]) == 0
    assert losses_of(broken) == losses_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["train", "--text", "no_such_file.txt", "--steps", "1"], "no_such_file.txt"),
        (["train", "--resume", "no_such_run"], "no_such_run"),
        (["train", "--tokenizer", "klingon", "--steps", "1"], "klingon"),
        (["train", "--steps", "1", "--batch-size", "0"], "batch_size must be a whole number of at least 1"),
        (["train", "--resume", "x", "--text", "y"], "leave --text and --out out"),
        (["generate", "--model", "no_such_model", "--prompt", "a"], "no_such_model"),
    ],
)
def test_a_users_error_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, args, text):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err


def test_a_text_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path, capsys):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"first line\nsecond l\xefne\n" * 50)
    assert cli.main(["train", "--text", str(path), "--out", str(tmp_path / "run"), "--steps", "1", *TINY]) == 2
    assert "line 2" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(trained, capsys):
    assert cli.main(["train", "--out", str(trained), "--steps", "1", *TINY]) == 2
    assert "--resume" in capsys.readouterr().err


def test_an_empty_prompt_is_refused(trained, capsys):
    assert cli.main(["generate", "--model", str(trained), "--prompt", ""]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_a_closed_pipe_is_not_an_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgpt", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_the_quick_demo_trains_generates_and_compares(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "The machine" in out
    ratios = re.findall(r"^  (book|torch|fastgpt) +[\d.,]+ tokens/s +([\d.]+) x$", out, re.M)
    assert [name for name, _ in ratios] == ["book", "torch", "fastgpt"] * 2
    # Run again: its own older results are replaced, other people's files are not.
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "other")]) == 2


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A classifier after one epoch on the embedded messages."""
    folder = tmp_path_factory.mktemp("runs") / "spam"
    args = ["finetune", "classify", "--out", str(folder), "--epochs", "1", "--tokenizer", "byte", "--max-length", "32"]
    assert cli.main(args) == 0
    return folder


def test_a_classifier_is_trained_and_names_the_class_of_each_message(classifier, capsys):
    assert cli.main(["classify", "--model", str(classifier), "You have won a prize", "See you at eight?"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows] == ["You have won a prize", "See you at eight?"]
    assert all(row[0] in ("spam", "ham", "not spam") and 0.5 <= float(row[1]) <= 1 for row in rows)


def test_a_finished_fine_tuning_run_can_be_resumed_and_gives_its_accuracy(classifier, capsys):
    assert cli.main(["finetune", "--resume", str(classifier)]) == 0
    assert "Accuracy: training" in capsys.readouterr().out


def test_an_assistant_is_trained_and_answers_in_a_chat(tmp_path):
    folder = tmp_path / "assistant"
    args = ["--epochs", "1", "--tokenizer", "story", "--batch-size", "16"]
    done = fastgpt("finetune", "instruct", "--out", folder, *args)
    assert done.returncode == 0, done.stderr
    assert "Test loss" in done.stdout and (folder / "answers.json").is_file()
    questions = "Name a color.\n/temperature 0.5\n/input The sea.\nWhat is it?\n/help\n/temperature -1\n"
    chat = fastgpt("chat", "--model", folder, "--tokens", "4", stdin=questions)
    assert chat.returncode == 0, chat.stderr
    assert "/quit" in chat.stdout and "A temperature is a number of at least 0" in chat.stdout


def test_finetune_without_a_task_says_which_there_are(capsys):
    assert cli.main(["finetune"]) == 2
    assert "fastgpt finetune classify, or fastgpt finetune instruct" in capsys.readouterr().err


def test_an_exported_model_generates_the_same_text(trained, tmp_path, capsys):
    one = tmp_path / "one.safetensors"
    assert cli.main(["export", "--model", str(trained), "--to", "book", "--out", str(one)]) == 0
    capsys.readouterr()
    texts = []
    for path in (trained, one):
        assert cli.main(["generate", "--model", str(path), "--prompt", "The", "--tokens", "9", "--seed", "3"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert cli.main(["export", "--model", str(trained), "--out", str(tmp_path / "hf")]) == 0
    assert {"model.safetensors", "config.json"} <= {path.name for path in (tmp_path / "hf").iterdir()}
    assert cli.main(["export", "--model", str(trained), "--out", str(tmp_path / "hf")]) == 2


def test_the_check_is_green_on_this_machine(capsys):
    assert cli.main(["check", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and "losses of 10 training steps" in out


def test_the_check_is_red_when_an_op_is_wrong(monkeypatch, capsys):
    from fastgpt.ops.gelu import backend_torch

    right = backend_torch.apply
    monkeypatch.setattr(backend_torch, "apply", lambda x, bias: right(x, bias) * 1.001)
    assert cli.main(["check", "--device", "cpu"]) == 1
    assert re.search(r"^FAIL +gelu float32 on torch", capsys.readouterr().out, re.M)
