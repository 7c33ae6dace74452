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

from fastgpt import cli

TINY = ["--size", "tiny", "--batch-size", "2", "--context", "16", "--tokenizer", "byte", "--eval-every", "5"]


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
