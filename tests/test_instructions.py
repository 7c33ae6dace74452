"""Chapter 7: prompts, collation, data files, the judge, and whole runs."""

from __future__ import annotations

import dataclasses
import http.server
import json
import re
import threading
import types

import pytest
import torch

from fastgpt.book import ch07
from fastgpt.finetuning import (
    InstructionSettings,
    answer,
    finetune_instructions,
    load_instructions,
    read_instructions,
    resume_finetuning,
)
from fastgpt.finetuning.base_model import OrdinaryTokenizer
from fastgpt.finetuning.datasets import split_instructions
from fastgpt.finetuning.instructions import extract_response, format_prompt
from fastgpt.model import GPTModel
from fastgpt.reference import generate
from fastgpt.tokenizer import ByteTokenizer, get_tokenizer
from fastgpt.training import Reporter
from fastgpt.weights import CheckpointError, load_model

TOKENIZER = ByteTokenizer()
ENTRY = {"instruction": "Name the capital.", "input": "Peru", "output": "Lima"}
PAD = 50256


# Prompts and batches.


def test_the_prompt_is_alpacas_to_the_letter():
    assert ch07.format_input(ENTRY) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName the capital.\n\n### Input:\nPeru"
    )


def test_an_empty_input_has_no_section():
    assert ch07.format_input(ENTRY | {"input": ""}).endswith("\n\n### Instruction:\nName the capital.")


def test_the_dataset_gives_lists_of_ids_of_prompt_and_answer():
    data = ch07.InstructionDataset([ENTRY], TOKENIZER)
    assert data[0] == list(f"{ch07.format_input(ENTRY)}\n\n### Response:\nLima".encode())
    assert len(data) == 1 and data.data == [ENTRY] and data.encoded_texts == [data[0]]


BATCH = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
INPUTS = [[0, 1, 2, 3, 4], [5, 6, PAD, PAD, PAD], [7, 8, 9, PAD, PAD]]


def test_the_first_draft_pads_to_the_longest():
    assert ch07.custom_collate_draft_1(BATCH).tolist() == INPUTS


def test_the_second_draft_shifts_the_targets():
    inputs, targets = ch07.custom_collate_draft_2(BATCH)
    assert inputs.tolist() == INPUTS
    assert targets.tolist() == [[1, 2, 3, 4, PAD], [6, PAD, PAD, PAD, PAD], [8, 9, PAD, PAD, PAD]]


def test_the_collation_gives_the_books_known_result():
    inputs, targets = ch07.custom_collate_fn(BATCH)
    assert inputs.tolist() == INPUTS
    assert targets.tolist() == [[1, 2, 3, 4, PAD], [6, PAD, -100, -100, -100], [8, 9, PAD, -100, -100]]
    assert inputs.dtype is targets.dtype is torch.int64
    assert BATCH == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]


def test_rows_are_cut_and_only_the_first_end_of_text_counts():
    inputs, targets = ch07.custom_collate_fn([[1, 9, 2, 9], [3]], pad_token_id=9, ignore_index=-1, allowed_max_length=3)
    assert inputs.tolist() == [[1, 9, 2], [3, 9, 9]]
    assert targets.tolist() == [[9, 2, -1], [9, -1, -1]]


# Data.


def test_the_embedded_instructions_are_sixty_different_tasks():
    entries = load_instructions()
    assert len(entries) == 60
    assert len({(e["instruction"], e["input"]) for e in entries}) == 60
    assert all(set(e) == {"instruction", "input", "output"} and e["output"].strip() for e in entries)


def test_sums_in_the_embedded_instructions_are_right():
    answers = {e["instruction"] + e["input"]: e["output"] for e in load_instructions()}
    numbers = [text for text in answers.values() if re.fullmatch(r"[\d +]+ = \d+\.", text)]
    assert numbers and all(sum(map(int, re.findall(r"\d+", t)[:-1])) == int(re.findall(r"\d+", t)[-1]) for t in numbers)


def test_the_book_cuts_in_order_with_the_test_part_before_validation():
    train, validation, test = split_instructions(list(range(20)))
    assert (train, test, validation) == (list(range(17)), [17, 18], [19])


def test_the_input_may_be_missing_and_other_keys_stay(tmp_path):
    (tmp_path / "d.json").write_text('[{"instruction": "a", "output": "b", "source": 3}]')
    assert read_instructions(tmp_path / "d.json") == [{"instruction": "a", "output": "b", "source": 3, "input": ""}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"instruction": "a",\n "output" "b"}]', "not JSON: .* line 2"),
        (b"[1", "not JSON"),
        (b"[]", "an empty list"),
        (b'{"instruction": "a"}', "a JSON list.*got dict"),
        (b'[{"instruction": "a", "output": "b"}, 7]', "entry 1: wanted an object, got int"),
        (b'[{"instruction": "a", "input": ""}]', "entry 0: 'output' is missing"),
        (b'[{"instruction": "a", "output": 5}]', "entry 0: 'output' must be a text; got 5"),
        (b'[{"instruction": "  ", "output": "b"}]', "entry 0: 'instruction' is empty"),
        (b'[{"instruction": "\xe4"}]', "not UTF-8: line 1"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
    ],
)
def test_a_damaged_file_of_instructions_is_located(tmp_path, content, message):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_instructions(tmp_path / "d.json")


def test_a_file_that_is_there_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    (tmp_path / "d.json").write_text('[{"a": "é"}]', encoding="utf-8")
    assert ch07.download_and_load_file(tmp_path / "d.json", "https://x.invalid/d.json") == [{"a": "é"}]
    with pytest.raises(OSError, match="FASTGPT_OFFLINE"):
        ch07.download_and_load_file(tmp_path / "e.json", "https://x.invalid/d.json")


def test_a_file_that_is_not_there_is_downloaded_once(tmp_path):
    (tmp_path / "source.json").write_text('[{"a": 1}]')
    url = (tmp_path / "source.json").as_uri()
    assert ch07.download_and_load_file(tmp_path / "d.json", url) == [{"a": 1}]
    (tmp_path / "source.json").unlink()
    assert ch07.download_and_load_file(tmp_path / "d.json", url) == [{"a": 1}]


def test_the_real_instructions_are_split_as_in_the_book(shared_data, monkeypatch):
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(shared_data / "gpt2_bpe"))
    entries = read_instructions(shared_data / "instruction-data.json")
    parts = split_instructions(entries)
    assert [len(part) for part in parts] == [935, 55, 110]
    assert parts[2] == entries[935:1045] and parts[1] == entries[1045:]
    data = ch07.InstructionDataset(parts[1], get_tokenizer("gpt2"))
    inputs, targets = ch07.custom_collate_fn([data[i] for i in range(8)], allowed_max_length=1024)
    for row, ids in zip(range(8), data.encoded_texts, strict=False):
        counted = targets[row][targets[row] != -100].tolist()
        assert counted == [*ids[1:], PAD] and inputs[row, : len(ids)].tolist() == ids


# The judge.


class FakeOllama(http.server.BaseHTTPRequestHandler):
    """Answers each question with what the test has put into `replies`, in two pieces."""

    replies: list[str] = []
    questions: list[dict] = []

    def do_POST(self):
        self.questions.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        reply = self.replies.pop(0)
        lines = [json.dumps({"message": {"content": piece}}) for piece in (reply[:1], reply[1:])]
        body = ("\n".join(lines) if reply != "broken" else '{"error": 1}').encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def ollama():
    FakeOllama.replies, FakeOllama.questions = [], []
    server = http.server.HTTPServer(("127.0.0.1", 0), FakeOllama)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api/chat"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_question_is_asked_with_the_books_options(ollama, monkeypatch):
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    FakeOllama.replies.append("Llamas eat grass.")
    assert ch07.query_model("What do llamas eat?", "llama3", ollama) == "Llamas eat grass."
    assert FakeOllama.questions == [
        {
            "model": "llama3",
            "messages": [{"role": "user", "content": "What do llamas eat?"}],
            "options": {"seed": 123, "temperature": 0, "num_ctx": 2048},
        }
    ]


def test_a_judge_that_does_not_answer_is_explained(ollama, monkeypatch):
    FakeOllama.replies.append("broken")
    with pytest.raises(ValueError, match="did not answer as Ollama"):
        ch07.query_model("a", url=ollama)
    with pytest.raises(ConnectionError, match="ollama serve"):
        ch07.query_model("a", url="http://127.0.0.1:9/api/chat")
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="FASTGPT_OFFLINE"):
        ch07.query_model("a", url="http://judge.invalid/api/chat")


def test_scores_skip_what_is_no_number_and_give_zero_to_silence(monkeypatch, capsys):
    from fastgpt.finetuning import scoring

    asked, replies = [], ["85", "very good", " 70\n"]
    monkeypatch.setattr(scoring, "query_model", lambda prompt, model: asked.append(prompt) or replies.pop(0))
    entries = [ENTRY | {"answer": text} for text in ("Lima", "Lima!", "", "It is Lima")]
    assert ch07.generate_model_scores(entries, "answer") == [85, 0, 70]
    assert "Could not convert score: very good" in capsys.readouterr().out
    assert len(asked) == 3 and ch07.format_input(ENTRY) in asked[0] and "It is Lima" in asked[2]


def test_running_processes_are_asked_through_psutil(monkeypatch):
    import sys

    processes = [types.SimpleNamespace(info={"name": name}) for name in ("bash", None, "ollama serve")]
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(process_iter=lambda attributes: processes))
    assert ch07.check_if_running("ollama") and not ch07.check_if_running("llama.cpp")
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r'check_if_running needs psutil.*pip install "fastgpt\[book\]"'):
        ch07.check_if_running("ollama")


# Answers and whole runs.

TINY = {
    "context_length": 320,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 1,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
RUN = InstructionSettings(model=TINY, tokenizer="story", epochs=2, answer_tokens=12, device="cpu", lr=3e-3)


def test_answers_in_batches_equal_the_books_loop_one_by_one():
    torch.manual_seed(0)
    model = GPTModel(TINY | {"vocab_size": 257}).eval()
    entries = load_instructions()[:11]
    tokenizer = OrdinaryTokenizer(TOKENIZER)
    wanted = []
    for entry in entries:
        prompt = torch.tensor([tokenizer.encode(format_prompt(entry))])
        ids = generate(model, prompt, 10, 320, eos_id=256)
        wanted.append(TOKENIZER.decode(ids[0, prompt.shape[1] :].tolist()).strip())
    assert answer(model, tokenizer, entries, max_new_tokens=10) == wanted


def test_a_prompt_that_does_not_fit_is_answered_with_nothing():
    model = GPTModel(TINY | {"vocab_size": 257, "context_length": 16})
    assert answer(model, OrdinaryTokenizer(TOKENIZER), [ENTRY], max_new_tokens=4) == [""]


def test_the_response_is_what_follows_the_prompt():
    prompt = ch07.format_input(ENTRY)
    assert extract_response(f"{prompt}\n\n### Response:\nLima\n", prompt) == "Lima"


def test_a_run_learns_and_keeps_model_and_answers(tmp_path):
    result = finetune_instructions(dataclasses.replace(RUN, out_dir=str(tmp_path / "r"), epochs=4))
    assert (result.n_train, result.n_validation, result.n_test) == (51, 3, 6)
    assert len(result.losses) == 4 * 6 and result.losses[-1] < 0.8 * result.losses[0]
    assert result.test_loss < result.losses[0]
    saved = json.loads((tmp_path / "r" / "answers.json").read_text("utf-8"))
    assert saved == list(result.answers) and len(saved) == 6
    assert {"instruction", "input", "output", "model_response"} == set(saved[0])
    model, info = load_model(tmp_path / "r" / "best.safetensors")
    assert info["tokenizer"] == "story" and info["task"] == "instruct"
    questions = [{key: e[key] for key in ("instruction", "input")} for e in saved]
    assert answer(model, result.tokenizer, questions, max_new_tokens=12) == [e["model_response"] for e in saved]


def test_the_validation_loss_counts_tokens_not_batches():
    from fastgpt.finetuning.assistant import _Batches

    torch.manual_seed(0)
    model = GPTModel(TINY | {"vocab_size": 257}).eval()
    data = ch07.InstructionDataset(load_instructions()[:3], TOKENIZER)
    settings = dataclasses.replace(RUN, batch_size=2)
    got = _Batches(model, OrdinaryTokenizer(TOKENIZER), settings, 320).mean_loss(data)
    sums, count = 0.0, 0
    for ids in data.encoded_texts:
        logits = model(torch.tensor([ids]))[0]
        sums += torch.nn.functional.cross_entropy(logits, torch.tensor([*ids[1:], 256]), reduction="sum").item()
        count += len(ids)
    assert got == pytest.approx(sums / count, abs=1e-5)


class StopAt(Reporter):
    """Presses Ctrl-C, once, at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step, loss, lr):
        import signal

        if step == self.at:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_lora_run_goes_on_exactly(tmp_path):
    settings = dataclasses.replace(RUN, trainable="lora", lora_rank=4, answers=2, eval_every=4)
    whole = finetune_instructions(settings)
    stopped = finetune_instructions(dataclasses.replace(settings, out_dir=str(tmp_path / "r")), reporter=StopAt(7))
    assert stopped.interrupted and stopped.answers == ()
    (tmp_path / "r").rename(tmp_path / "moved")
    resumed = resume_finetuning(tmp_path / "moved")
    assert resumed.losses == whole.losses and resumed.evaluations == whole.evaluations
    assert resumed.answers == whole.answers and resumed.test_loss == whole.test_loss


def test_only_fine_tuning_runs_can_be_resumed(tmp_path):
    from fastgpt.weights import save_weights

    save_weights(tmp_path / "last.safetensors", torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="not a checkpoint of a fine-tuning run"):
        resume_finetuning(tmp_path)


def test_a_text_with_the_end_of_text_mark_is_plain_text():
    tokenizer = OrdinaryTokenizer(TOKENIZER)
    assert 256 not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_too_few_entries_and_impossible_settings_are_explained(tmp_path):
    (tmp_path / "d.json").write_text('[{"instruction": "a", "output": "b"}]')
    with pytest.raises(ValueError, match="One part is empty"):
        finetune_instructions(dataclasses.replace(RUN, data=str(tmp_path / "d.json")))
    with pytest.raises(ValueError, match="answers"):
        dataclasses.replace(RUN, answers=-1)
    with pytest.raises(ValueError, match="context_length is 320"):
        finetune_instructions(dataclasses.replace(RUN, max_length=321))
