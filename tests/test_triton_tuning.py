"""`fastgpt bench --tune` with a clock that is made up; test_triton_interpreter.py runs this in the interpreter."""

from __future__ import annotations

import pytest
import torch

from fastgpt import cli, ops, timing, tuning
from fastgpt.commands import tune
from fastgpt.ops import triton_support

if not triton_support.interpreting():
    pytest.skip("test_triton_interpreter.py runs this in the interpreter", allow_module_level=True)

pytestmark = pytest.mark.parametrize("op_backend", ["triton"], indirect=True)
SIZES = "--rows=5 --tokens=5 --emb-dim=24 --head-dim=24 --vocab-size=20 --dtype=float32".split()  # noqa: SIM905


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the tiles go; two candidates of each kernel are timed, and the later one always wins."""
    path, clock = tmp_path / "tiles.json", iter(range(10**6, 0, -1))

    def race(providers, **unused):
        for function in providers.values():
            function()
        return {name: timing.Timing(next(clock), 0, 0, 1) for name in providers}

    def few(args, dtype, jobs=tune.jobs):
        for job in jobs(args, dtype):
            yield tune.Job(job.kernel, job.width, job.dropout, [job.candidates[0], job.candidates[-1]], job.call)

    monkeypatch.setattr(timing, "race", race)
    monkeypatch.setattr(tune, "jobs", few)
    monkeypatch.setenv("FASTGPT_TILES", str(path))
    tuning._tiles.cache_clear()
    yield path
    tuning._tiles.cache_clear()


def test_every_kernel_is_tuned_and_takes_what_was_found(op_backend, file, monkeypatch):
    assert cli.main(["bench", "--tune", *SIZES]) == 0
    found = tuning.read(file)
    assert {name.split()[0] for name in found} == set(tuning.KERNELS)
    taken = []
    monkeypatch.setattr(tuning, "choose", lambda *a, choose=tuning.choose: taken.append(choose(*a)) or taken[-1])
    x, residual, weight, bias = torch.randn(9, 24), torch.randn(9, 24), torch.randn(24), torch.randn(24)
    got = ops.dropout_add_layer_norm(x, residual, weight, bias, backend="triton")
    assert taken == [found["dropout_add_layer_norm_forward interpreter 32 32 plain"]]
    want = ops.dropout_add_layer_norm(x, residual, weight, bias, backend="reference")
    torch.testing.assert_close(got, want)


def test_a_tile_that_gives_other_numbers_is_left_out(op_backend, file, capsys):
    good, bad = tuning.RowTile(1, 512, 4), tuning.RowTile(1, 1024, 4)

    def call():
        tile = tuning.choose("gelu_forward", {("any", 0, 0): good}, "interpreter", 32, 16)
        return torch.ones(3) if tile == good else torch.tensor([1, 1, torch.nan])

    job = tune.Job("gelu_forward", 16, False, [good, bad], call)
    assert tune.tune(job, "cpu")[0] == good
    assert "columns=1024" in capsys.readouterr().out


def test_one_kernel_can_be_tuned_alone(op_backend, file):
    assert cli.main(["bench", "--tune", "--kernels", "cross", *SIZES]) == 0
    assert [name.split()[0] for name in tuning.read(file)] == ["cross_entropy"]


def test_descriptors_are_tried_where_they_can_be(op_backend):
    assert not any(tile.tma for tile in tune.attention_tiles(False))
    assert sum(tile.tma for tile in tune.attention_tiles(True)) == 24
