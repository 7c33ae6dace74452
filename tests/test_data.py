"""The dataset and loader of chapter 2 against windows cut one by one, and the same random numbers drawn."""

from __future__ import annotations

import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from fastgpt.book import ch02
from fastgpt.data import GPTDatasetV1, TokenFile, TokenWindows, create_dataloader_v1, load_story, read_text
from fastgpt.tokenizer import ByteTokenizer, get_tokenizer


class NaiveDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows cut one by one into two lists of tensors."""

    def __init__(self, ids: list[int], max_length: int, stride: int) -> None:
        starts = range(0, len(ids) - max_length, stride)
        self.input_ids = [torch.tensor(ids[i : i + max_length]) for i in starts]
        self.target_ids = [torch.tensor(ids[i + 1 : i + max_length + 1]) for i in starts]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.input_ids[idx], self.target_ids[idx]


class Numbers:
    """Text of numbers to those numbers: windows can be read off."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def numbers(n: int) -> str:
    return " ".join(map(str, range(n)))


def same_batches(got: Any, want: Any) -> None:
    got, want = list(got), list(want)
    assert len(got) == len(want)
    for (inputs, targets), (want_inputs, want_targets) in zip(got, want, strict=True):
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, want_inputs)
        assert torch.equal(targets, want_targets)


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_windows_are_those_of_the_naive_loop(n_tokens: int, max_length: int, stride: int) -> None:
    dataset = GPTDatasetV1(numbers(n_tokens), Numbers(), max_length, stride)
    want = NaiveDataset(list(range(n_tokens)), max_length, stride)
    assert len(dataset) == len(want)
    same_batches((dataset[i] for i in range(len(dataset))), (want[i] for i in range(len(want))))
    same_batches(zip(dataset.input_ids, dataset.target_ids, strict=True), want)


def test_the_first_window_of_the_verdict(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(shared_data / "gpt2_bpe"))
    text = read_text(shared_data / "the-verdict.txt")
    loader = create_dataloader_v1(text, batch_size=1, max_length=4, stride=1, shuffle=False)
    batches = iter(loader)
    assert [t.tolist() for t in next(batches)] == [[[40, 367, 2885, 1464]], [[367, 2885, 1464, 1807]]]
    assert [t.tolist() for t in next(batches)] == [[[367, 2885, 1464, 1807]], [[2885, 1464, 1807, 3619]]]


def test_the_chapters_batch_of_eight(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(shared_data / "gpt2_bpe"))
    text = read_text(shared_data / "the-verdict.txt")
    loader = create_dataloader_v1(text, batch_size=8, max_length=4, stride=4, shuffle=False)
    inputs, targets = next(iter(loader))
    assert inputs[0].tolist() == [40, 367, 2885, 1464]
    assert inputs[1].tolist() == [1807, 3619, 402, 271]
    assert targets[7].tolist() == inputs[7].tolist()[1:] + [int(targets[7, -1])]
    assert torch.equal(inputs[1:, 0], targets[:-1, -1])


def test_end_of_text_becomes_one_token() -> None:
    dataset = GPTDatasetV1("ab<|endoftext|>cd", ByteTokenizer(), max_length=4, stride=1)
    assert dataset[0][0].tolist() == [97, 98, 256, 99]


def test_lists_behave_as_lists() -> None:
    dataset = GPTDatasetV1(numbers(12), Numbers(), 4, 3)
    assert isinstance(dataset.input_ids, list)
    assert torch.stack(dataset.input_ids).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert torch.stack(dataset.target_ids[-2:]).tolist() == [[4, 5, 6, 7], [7, 8, 9, 10]]
    assert dataset.input_ids is dataset.input_ids


def test_indices_count_from_the_end_and_stop() -> None:
    dataset = GPTDatasetV1(numbers(12), Numbers(), 4, 3)
    assert dataset[-1][0].tolist() == [6, 7, 8, 9]
    assert len(list(dataset)) == 3
    with pytest.raises(IndexError):
        dataset[3]


def test_a_text_that_is_too_short_gives_an_empty_dataset_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fastgpt"):
        dataset = GPTDatasetV1(numbers(4), Numbers(), max_length=4, stride=1)
    assert (len(dataset), dataset.input_ids) == (0, [])
    assert "4 tokens, but one window of max_length=4 needs 5" in caplog.text


@pytest.mark.parametrize(("max_length", "stride"), [(0, 1), (4, 0), (4, -1)])
def test_sizes_below_one_are_refused(max_length: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1; got max_length={max_length}, stride={stride}"):
        GPTDatasetV1(numbers(9), Numbers(), max_length, stride)


@pytest.mark.parametrize("drop_last", [True, False])
def test_shuffled_batches_are_those_of_the_naive_loop_for_the_same_seed(drop_last: bool) -> None:
    ids = list(range(300))
    torch.manual_seed(123)
    loader = create_dataloader_v1(numbers(300), 4, 8, 5, drop_last=drop_last, tokenizer=Numbers())
    got = [list(loader), list(loader), torch.rand(1)]
    torch.manual_seed(123)
    want_loader = DataLoader(NaiveDataset(ids, 8, 5), batch_size=4, shuffle=True, drop_last=drop_last)
    want = [list(want_loader), list(want_loader), torch.rand(1)]
    same_batches(got[0], want[0])
    same_batches(got[1], want[1])
    # No other number was drawn on the way.
    assert torch.equal(got[2], want[2])


def test_the_signature_is_the_books_with_the_tokenizer_by_keyword() -> None:
    parameters = inspect.signature(create_dataloader_v1).parameters
    assert {name: p.default for name, p in parameters.items() if name != "txt"} == {
        "batch_size": 4,
        "max_length": 256,
        "stride": 128,
        "shuffle": True,
        "drop_last": True,
        "num_workers": 0,
        "tokenizer": None,
    }
    assert parameters["tokenizer"].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_tokenizer_may_come_second_as_in_later_chapters() -> None:
    want = create_dataloader_v1(numbers(99), 2, 4, 4, shuffle=False, tokenizer=Numbers())
    second: Any = create_dataloader_v1
    same_batches(second(numbers(99), Numbers(), 2, 4, 4, False), want)
    same_batches(second(numbers(99), Numbers(), batch_size=2, max_length=4, stride=4, shuffle=False), want)


def test_token_files_give_the_windows_of_the_text(tmp_path: Path) -> None:
    story = get_tokenizer("story")
    file = TokenFile.write(tmp_path / "a.tokens", load_story(), story)
    dataset, want = TokenWindows(file, 64, 50), GPTDatasetV1(load_story(), story, 64, 50)
    assert len(dataset) == len(want)
    same_batches(dataset, want)


def test_a_dataset_pickles_without_its_lists() -> None:
    dataset = GPTDatasetV1(load_story(), ByteTokenizer(), 64, 1)
    size = len(pickle.dumps(dataset))
    assert len(dataset.input_ids) == len(dataset)
    data = pickle.dumps(dataset)
    assert len(data) == size
    same_batches([pickle.loads(data)[5]], [dataset[5]])


@pytest.mark.parametrize("kind", ["text", "file"])
def test_spawned_workers_give_the_same_batches(kind: str, tmp_path: Path) -> None:
    story = get_tokenizer("story")
    if kind == "file":
        dataset = TokenWindows(TokenFile.write(tmp_path / "a.tokens", load_story(), story), 64, 64)
    else:
        dataset = GPTDatasetV1(load_story(), story, 64, 64)
    loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="spawn")
    same_batches(loader, DataLoader(dataset, batch_size=8))


def test_worker_processes_can_be_asked_for() -> None:
    loader = create_dataloader_v1(numbers(99), 2, 4, 4, shuffle=False, num_workers=1, tokenizer=Numbers())
    same_batches(loader, create_dataloader_v1(numbers(99), 2, 4, 4, shuffle=False, tokenizer=Numbers()))


def test_chapter_2_exports_the_books_names() -> None:
    names = {"SimpleTokenizerV1", "SimpleTokenizerV2", "GPTDatasetV1", "create_dataloader_v1"}
    assert names | {"BPETokenizerSimple", "Encoder", "get_encoder"} == set(ch02.__all__)
    assert ch02.create_dataloader_v1 is create_dataloader_v1
