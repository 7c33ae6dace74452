"""Proves the package outside the checkout: sdist, wheel from the sdist, install in an empty environment, use it there.

    python tools/wheel_check.py

The new environment gets torch from constraints.txt and nothing that the checkout's own environment has.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

USE = """
import fastgpt, torch
from fastgpt.book.ch04 import GPTModel, generate_text_simple
from fastgpt.ops import extension
assert "site-packages" in fastgpt.__file__, fastgpt.__file__
assert extension.why_not("cpu") is None, extension.why_not("cpu")
cfg = dict(vocab_size=97, context_length=16, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=False)
model = GPTModel(cfg).eval()
print(generate_text_simple(model, torch.tensor([[1, 2, 3]]), 5, 16))
print(len(fastgpt.load_story()), "characters of the embedded story")
"""


def run(*command: object, cwd: Path) -> None:
    """Run one command, shown as it would be typed."""
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=cwd)


def main() -> None:
    """sdist -> wheel -> empty environment -> another folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # pip builds from a plain copy of what git tracks, as a fresh clone has it.
        run(sys.executable, "-m", "build", "--sdist", "--outdir", folder / "sdist", ROOT, cwd=ROOT)
        (sdist,) = (folder / "sdist").glob("*.tar.gz")
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "wheel", sdist, cwd=folder)
        (wheel,) = (folder / "wheel").glob("*.whl")
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        shutil.copy(ROOT / "constraints.txt", folder)
        run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "torch", cwd=folder)
        run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", wheel, cwd=folder)
        run(python, "-c", USE, cwd=folder)
        run(python, "-m", "fastgpt", "info", cwd=folder)
    print("The wheel works in an empty environment.")


if __name__ == "__main__":
    main()
