"""The shape of the repository: layers import downward, nothing happens at import, the two READMEs agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastgpt"

# Lowest first. A module imports from its own layer's package or from a lower layer.
LAYERS = (
    ("_version", "env"),
    ("kernels", "config", "memory", "text", "timing", "tuning"),
    ("ops", "testing", "bpe", "vocabulary"),
    ("fusion",),
    ("model", "model_fast", "reference", "tokenizer", "teaching_tokenizers", "token_file", "data"),
    ("attention_variants", "stubs", "weights", "acceleration"),
    ("generation", "about"),
    ("comparison", "training"),
    ("finetuning",),
    ("check",),
    ("commands",),
    ("cli", "__main__"),
)
# They only re-export (book), or teach beside the model.
ANYWHERE = ("book", "__init__")


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "kernels" not in path.relative_to(PACKAGE).parts]


def top_level(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Top-level names inside fastgpt that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            own = node.module == "fastgpt"
            names |= {f"fastgpt.{alias.name}" for alias in node.names} if own else {node.module}
    return {name.split(".")[1] for name in names if name.startswith("fastgpt.")}


def layer(name: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def test_every_module_has_its_layer():
    unknown = {top_level(path) for path in modules() if layer(top_level(path)) is None} - set(ANYWHERE)
    assert not unknown, f"put them into LAYERS: {sorted(unknown)}"


def test_layers_import_only_downward():
    wrong = [
        f"{path.relative_to(ROOT)} imports fastgpt.{name}"
        for path in modules()
        if top_level(path) not in ANYWHERE
        for name in imports(path)
        if name != top_level(path) and (layer(name) or 0) > (layer(top_level(path)) or 0)
    ]
    assert not wrong, "\n".join(wrong)


def test_book_modules_only_re_export():
    for path in (PACKAGE / "book").rglob("*.py"):
        body = ast.parse(path.read_text("utf-8")).body
        logic = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign)]
        assert not logic, f"{path.relative_to(ROOT)}:{logic[0].lineno} has logic"


def test_the_environment_is_read_in_env_alone():
    readers = [
        str(path.relative_to(ROOT))
        for path in modules()
        if path.name != "env.py" and re.search(r"os\.environ|os\.getenv", path.read_text("utf-8"))
    ]
    assert not readers


def test_files_stay_within_one_room():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("this is not a git checkout")
    code = [f for f in files if f.endswith((".py", ".h", ".cpp", ".cu", ".cuh")) and not f.startswith("tests/")]
    source = [ROOT / f for f in code if (ROOT / f).is_file()]
    long = {str(path): count for path in source if (count := len(path.read_text("utf-8").splitlines())) > 450}
    assert not long


def test_the_kernels_link_is_a_folder_and_no_package_named_kernels_is_importable():
    assert (PACKAGE / "kernels" / "cpu" / "simd.h").is_file()
    code = "import importlib.util as u, sys; sys.path.pop(0); assert u.find_spec('kernels') is None"
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True)


def test_importing_fastgpt_is_silent_and_changes_nothing_in_torch():
    code = """
import torch
def state():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark, torch.initial_seed(), torch.is_grad_enabled(), torch.get_default_device())
torch.manual_seed(5)
rng, before = torch.get_rng_state(), state()
import fastgpt, fastgpt.model, fastgpt.generation, fastgpt.training, fastgpt.ops
assert state() == before and torch.equal(torch.get_rng_state(), rng)
"""
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def headings(text: str) -> list[int]:
    return [len(match[1]) for match in re.finditer(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)]


def test_both_readmes_have_the_same_sections_commands_and_numbers():
    english = (ROOT / "README.md").read_text("utf-8")
    chinese = (ROOT / "README.zh-CN.md").read_text("utf-8")
    assert headings(english) == headings(chinese)
    code = re.compile(r"^```(?:bash|python)\n(.*?)^```", re.S | re.M)
    # Comments inside the blocks are translated; commands are not.
    plain = [[re.sub(r"\s*#.*", "", block) for block in code.findall(text)] for text in (english, chinese)]
    assert plain[0] == plain[1]
    tables = [re.findall(r"\d+(?:[.,]\d+)*", "".join(re.findall(r"^\|.*$", text, re.M))) for text in (english, chinese)]
    assert tables[0] == tables[1]
    assert "大语言模型" in chinese


def test_the_readme_shows_the_two_commands():
    english = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in english and "make test" in english
