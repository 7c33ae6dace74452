"""The choice of a backend: nearest wins, an explicit choice that cannot run raises, the automatic one steps down."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

from fastgpt import env, ops
from fastgpt.ops import dispatch, extension

ROOMS = (
    "attention",
    "decode_attention",
    "dropout_add_layer_norm",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
)
HALF = torch.ones(3, 4, dtype=torch.float16)


def room(name):
    return importlib.import_module(f"fastgpt.ops.{name}")


def test_the_argument_wins_over_the_context_and_the_context_over_the_environment(monkeypatch):
    monkeypatch.setattr(dispatch, "_from_environment", lambda: "torch")
    assert dispatch.requested() == "torch"
    with ops.use_backend("cpu"):
        assert dispatch.requested() == "cpu"
        assert dispatch.requested("reference") == "reference"
        with ops.use_backend("auto"):
            assert dispatch.requested() == "auto"
        assert dispatch.requested() == "cpu"
    assert dispatch.requested() == "torch"


def test_the_context_is_left_when_its_block_raises():
    with pytest.raises(KeyError), ops.use_backend("torch"):
        raise KeyError
    assert dispatch.requested() == "auto"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'cpus' is not known; use one of: auto, cuda"), ops.use_backend("cpus"):
        pass
    with pytest.raises(ValueError, match="use one of"):
        ops.gelu(torch.ones(2), backend="fast")


def test_an_explicit_choice_that_cannot_run_raises_with_every_reason():
    with pytest.raises(ops.BackendError) as error:
        ops.gelu(HALF, backend="cpu")
    text = str(error.value)
    assert "not float16" in text
    for backend in room("gelu").BACKENDS:
        assert f"{backend}:" in text


def test_a_backend_that_the_room_lacks_is_an_error_not_a_fallback():
    with pytest.raises(ops.BackendError, match="has no triton backend"):
        dispatch.Op("fastgpt.ops.gelu", ("cpu", "reference")).choose(room("gelu").Case("cpu", torch.float32), "triton")


def test_the_automatic_choice_steps_down_and_logs_once(caplog):
    op = dispatch.Op("fastgpt.ops.gelu", room("gelu").BACKENDS)
    case = room("gelu").Case("cpu", torch.float16)
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        first, second = op.choose(case), op.choose(case)
    assert first is second is op.module("torch")
    assert len(caplog.records) == 1
    assert "not cpu: the CPU kernels take float32 and bfloat16" in caplog.text


def test_a_backend_that_is_not_automatic_runs_only_when_named():
    class Op(dispatch.Op):
        def module(self, backend):
            return {"cuda": Unproven, "reference": Plain}[backend]

    class Plain:
        @staticmethod
        def why_not(case):
            return None

    class Unproven(Plain):
        AUTOMATIC = "unproven"

    op = Op("rooms.some_op", ("cuda", "reference"))
    assert op.choose("case") is Plain
    assert op.choose("case", "cuda") is Unproven


@pytest.mark.parametrize("name", ROOMS)
def test_every_room_has_its_backends_and_a_reference_that_can_always_run(name):
    for backend in room(name).BACKENDS:
        assert callable(room(name).OP.module(backend).why_not)
    assert room(name).BACKENDS[-1] == "reference"
    for case in room(name).EXAMPLE_CASES:
        assert room(name).OP.why_not("reference", case) is None


@pytest.mark.parametrize("name", ROOMS)
def test_the_cpu_kernels_are_what_runs_on_the_cpu(name):
    if extension.why_not("cpu"):
        pytest.skip(extension.why_not("cpu"))
    if "cpu" not in room(name).BACKENDS:
        pytest.skip(f"{name} has no cpu backend")
    for case in room(name).EXAMPLE_CASES:
        assert room(name).OP.choose(case).__name__.endswith("backend_cpu"), case


@pytest.mark.parametrize(("rows", "function"), [(255, "NativeLayerNormBackward0"), (257, "_LayerNormBackward")])
def test_a_tiny_input_is_left_to_pytorch_unless_a_backend_is_named(rows, function):
    if room("layer_norm").OP.why_not("cpu", room("layer_norm").EXAMPLE_CASES[0]):
        pytest.skip("layer_norm has no cpu backend")
    x, weight = torch.randn(rows, 512), torch.ones(512, requires_grad=True)
    assert ops.layer_norm(x, weight, weight).grad_fn.name() == function
    assert ops.layer_norm(x, weight, weight, backend="cpu").grad_fn.name() == "_LayerNormBackward"


@pytest.mark.parametrize(
    ("variable", "value", "read"),
    [
        ("FASTGPT_BACKEND", "gpu", env.backend),
        ("FASTGPT_NUM_THREADS", "0", env.num_threads),
        ("FASTGPT_NUM_THREADS", "two", env.num_threads),
        ("FASTGPT_ISA", "avx9", env.isa),
        ("FASTGPT_OFFLINE", "perhaps", env.offline),
        ("FASTGPT_LOG", "loud", env.log_level),
    ],
)
def test_a_bad_environment_variable_is_named(monkeypatch, variable, value, read):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable):
        read()


def test_the_environment_is_read_when_asked(monkeypatch):
    monkeypatch.setenv("FASTGPT_BACKEND", "Torch")
    monkeypatch.setenv("FASTGPT_NUM_THREADS", "3")
    monkeypatch.setenv("FASTGPT_OFFLINE", "yes")
    monkeypatch.setenv("FASTGPT_REQUIRE", "cuda, triton")
    assert env.backend() == "torch"
    assert env.num_threads() == 3
    assert env.offline() is True
    assert env.require() == {"cuda", "triton"}
