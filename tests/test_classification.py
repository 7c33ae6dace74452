"""Chapter 6: data, losses and accuracy at the last position, the fast head, training, and whole runs."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fastgpt import reference
from fastgpt.book import ch05, ch06
from fastgpt.finetuning import (
    ClassifierSettings,
    finetune_classifier,
    last_logits,
    load_classifier,
    load_messages,
    read_messages,
    replace_linear_with_lora,
    resume_finetuning,
)
from fastgpt.finetuning import loop as loop_module
from fastgpt.finetuning.datasets import Message, balance, split_messages
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast
from fastgpt.tokenizer import ByteTokenizer, get_tokenizer
from fastgpt.training import Reporter
from fastgpt.weights import CheckpointError, save_weights

CFG = {
    "vocab_size": 257,
    "context_length": 24,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
TOKENIZER = ByteTokenizer()


def make_model(kind: type = GPTModel, **changes: object) -> nn.Module:
    torch.manual_seed(123)
    model = kind(CFG | changes)
    model.out_head = nn.Linear(16, 2)
    return model


def batches(n: int = 5, batch_size: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(257, (n, 10), generator=generator)
    return DataLoader(list(zip(rows, torch.arange(n) % 2, strict=True)), batch_size=batch_size)


@pytest.fixture
def pandas():
    return pytest.importorskip("pandas")


@pytest.fixture
def frame(pandas):
    return pandas.DataFrame(load_messages(), columns=["Label", "Text"])


@pytest.fixture
def csv_file(tmp_path, frame):
    frame = frame.assign(Label=frame["Label"].map({"ham": 0, "spam": 1}))
    frame.to_csv(tmp_path / "train.csv", index=None)
    return tmp_path / "train.csv"


# The data.


def test_the_embedded_messages_can_be_learned_from():
    messages = load_messages()
    counts = {label: sum(m.label == label for m in messages) for label in ("ham", "spam")}
    assert counts == {"ham": 159, "spam": 140}
    assert len({m.text for m in messages}) == len(messages)


def test_the_balanced_set_is_pandas_sample_with_seed_123(frame):
    balanced = ch06.create_balanced_dataset(frame)
    assert balanced["Label"].value_counts().to_dict() == {"ham": 140, "spam": 140}
    ham = frame[frame["Label"] == "ham"].sample(140, random_state=123)
    assert balanced["Text"].tolist() == [*ham["Text"], *frame[frame["Label"] == "spam"]["Text"]]


def test_the_split_rounds_down_and_leaves_the_rest_for_the_test(frame):
    parts = ch06.random_split(frame, 0.7, 0.1)
    assert [len(part) for part in parts] == [209, 29, 61]
    shuffled = frame.sample(frac=1, random_state=123)["Text"].tolist()
    assert [text for part in parts for text in part["Text"]] == shuffled


def test_without_pandas_the_very_same_rows_are_drawn(frame):
    balanced = balance(load_messages())
    assert [m.text for m in balanced] == ch06.create_balanced_dataset(frame)["Text"].tolist()
    book = ch06.random_split(ch06.create_balanced_dataset(frame), 0.7, 0.1)
    for part, wanted in zip(split_messages(balanced, 0.7, 0.1), book, strict=True):
        assert [m.text for m in part] == wanted["Text"].tolist()


def test_the_dataset_pads_on_the_right_to_the_longest_message(csv_file):
    data = ch06.SpamDataset(csv_file, TOKENIZER, pad_token_id=256)
    assert data.max_length == max(len(m.text.encode()) for m in load_messages())
    assert len(data) == len(data.data) == 299
    ids, label = data[3]
    text = data.data["Text"][3]
    assert ids.tolist() == [*text.encode(), *[256] * (data.max_length - len(text))]
    assert ids.dtype is label.dtype is torch.int64 and label == data.data["Label"][3]
    assert data.encoded_texts[3] == ids.tolist()


def test_the_dataset_cuts_to_max_length(csv_file):
    data = ch06.SpamDataset(csv_file, TOKENIZER, max_length=5, pad_token_id=256)
    assert data[0][0].tolist() == list(data.data["Text"][0].encode()[:5])


def test_a_message_that_says_na_is_a_text(tmp_path, pandas):
    (tmp_path / "x.csv").write_text("Label,Text\n0,NA\n1,null\n")
    assert ch06.SpamDataset(tmp_path / "x.csv", TOKENIZER)[0][0].tolist()[:2] == [78, 65]


def test_wrong_columns_and_labels_are_explained(tmp_path, pandas):
    (tmp_path / "x.csv").write_text("label,Text\n0,a\n")
    with pytest.raises(ValueError, match="no column 'Label'"):
        ch06.SpamDataset(tmp_path / "x.csv", TOKENIZER)
    (tmp_path / "y.csv").write_text("Label,Text\nham,a\n")
    with pytest.raises(ValueError, match="whole numbers; got 'ham'"):
        ch06.SpamDataset(tmp_path / "y.csv", TOKENIZER)


def test_pandas_is_imported_only_where_it_is_needed():
    code = """
import sys
sys.modules["pandas"] = None
from fastgpt.book import ch06, ch07
try:
    ch06.SpamDataset("x.csv", None)
except ImportError as error:
    assert 'pip install "fastgpt[book]"' in str(error) and "SpamDataset" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_of_messages_may_have_quotes_and_empty_lines(tmp_path):
    (tmp_path / "m.tsv").write_text('ham\tone "two" three\n\nspam\t"a\tb"\tc\nspam\tdé\u2028f\n', encoding="utf-8")
    assert read_messages(tmp_path / "m.tsv") == [
        Message("ham", 'one "two" three'),
        Message("spam", "a\tb\tc"),
        Message("spam", "dé\u2028f"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ham\tok\nspam without tab\n", "line 2 has no tab"),
        (b"ham\tok\n\t text\n", "line 2 has no label"),
        (b"ham\tok\n\nham\t \n", "line 3 has no label or no text"),
        (b"\n\n", "holds no messages"),
        (b"ham\tok\nham\t\xff\n", "not UTF-8: line 2, byte 5"),
        (b'ham\t"' + b"x" * 200_000, "field larger than field limit.*quote"),
    ],
)
def test_a_damaged_file_of_messages_is_located(tmp_path, content, message):
    (tmp_path / "m.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_messages(tmp_path / "m.tsv")


# Losses, accuracy, and the head at the last position.


def test_the_loss_reads_the_last_position_alone():
    model = make_model(reference.GPTModel)
    inputs, labels = next(iter(batches()))
    wanted = nn.functional.cross_entropy(model(inputs)[:, -1, :], labels)
    assert torch.equal(ch06.calc_loss_batch(inputs, labels, model, "cpu"), wanted)


@pytest.mark.parametrize("kind", [GPTModel, GPTModelFast])
@pytest.mark.parametrize("lora", [False, True])
def test_the_fast_head_equals_the_full_computation(kind, lora):
    model = make_model(kind, drop_rate=0.2)
    if lora:
        replace_linear_with_lora(model, 2, 4)
        nn.init.normal_(model.out_head.lora.B)
    inputs, labels = next(iter(batches()))
    torch.manual_seed(9)
    fast = last_logits(model, inputs)
    fast.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(9)
    full = model(inputs)[:, -1, :]
    full.square().sum().backward()
    torch.testing.assert_close(fast, full, atol=1e-6, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def rows_seen_by_head(model: nn.Module, inputs: torch.Tensor) -> list[torch.Size]:
    """Shapes of what goes into the head, found without a hook."""
    seen = []
    weight = model.out_head.weight
    original = nn.functional.linear

    def spy(x, w, *rest):
        if w is weight:
            seen.append(x.shape)
        return original(x, w, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", spy)
        last_logits(model, inputs)
    return seen


def test_the_head_runs_on_one_position_a_row():
    inputs = next(iter(batches()))[0]
    assert rows_seen_by_head(make_model(), inputs) == [(2, 16)]


@pytest.mark.parametrize("part", ["model", "final_norm", "out_head"])
def test_hooks_see_the_full_computation(part):
    model = make_model()
    shapes = []
    module = model if part == "model" else getattr(model, part)
    module.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    last_logits(model, next(iter(batches()))[0])
    assert [shape[:2] for shape in shapes] == [(2, 10)]


def test_an_unknown_head_or_forward_gets_the_full_computation():
    inputs = next(iter(batches()))[0]

    class Pooling(nn.Module):
        def forward(self, x):
            return x.mean(dim=1, keepdim=True).expand_as(x)[..., :2]

    model = make_model()
    model.out_head = Pooling()
    assert torch.equal(last_logits(model, inputs), model(inputs)[:, -1, :])

    class Flipped(GPTModel):
        def forward(self, in_idx):
            return -super().forward(in_idx)

    flipped = make_model(Flipped)
    assert torch.equal(last_logits(flipped, inputs), flipped(inputs)[:, -1, :])


def test_the_loader_loss_is_the_mean_of_batch_means():
    model = make_model()
    each = [ch06.calc_loss_batch(*batch, model, "cpu").item() for batch in batches()]
    assert ch06.calc_loss_loader(batches(), model, "cpu") == pytest.approx(sum(each) / 3, abs=1e-7)
    assert ch06.calc_loss_loader(batches(), model, "cpu", num_batches=2) == pytest.approx(sum(each[:2]) / 2, abs=1e-7)
    assert math.isnan(ch06.calc_loss_loader([], model, "cpu"))


def test_accuracy_counts_rows_and_leaves_evaluation_mode():
    model = make_model().train()
    wanted = [(model.eval()(inputs)[:, -1].argmax(-1) == labels).float().sum().item() for inputs, labels in batches()]
    model.train()
    assert ch06.calc_accuracy_loader(batches(), model, "cpu") == sum(wanted) / 5
    assert not model.training
    assert ch06.calc_accuracy_loader(batches(), model, "cpu", num_batches=1) == wanted[0] / 2


def test_evaluation_ends_in_training_mode_and_differs_from_chapter_5():
    model = make_model().eval()
    train_loss, val_loss = ch06.evaluate_model(model, batches(), batches(), "cpu", eval_iter=1)
    assert model.training
    assert train_loss == val_loss == ch06.calc_loss_loader(batches(), model.eval(), "cpu", num_batches=1)
    assert ch06.calc_loss_batch is not ch05.calc_loss_batch


def test_training_follows_the_books_loop(capsys):
    def freeze(model):
        model.requires_grad_(False)
        for part in (model.out_head, model.trf_blocks[-1], model.final_norm):
            part.requires_grad_(True)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = freeze(make_model())
    got = ch06.train_classifier_simple(model, batches(), batches(3), optimizer, "cpu", 2, 2, None)
    twin, optimizer = freeze(make_model(reference.GPTModel))
    losses = []
    for _ in range(2):
        for inputs, labels in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(inputs)[:, -1, :], labels).backward()
            optimizer.step()
            losses.append(ch06.calc_loss_loader(batches(), twin, "cpu"))
    train_losses, val_losses, train_accs, val_accs, examples_seen = got
    assert train_losses == pytest.approx(losses[::2], abs=1e-5) and len(val_losses) == 3
    assert len(train_accs) == len(val_accs) == 2 and examples_seen == 10
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", lines[0])
    assert re.fullmatch(r"Training accuracy: [\d.]{4,6}% \| Validation accuracy: [\d.]{4,6}%", lines[2])
    assert len(lines) == 5


def test_frozen_weights_stay_to_the_bit():
    model = make_model()
    model.requires_grad_(False)
    model.out_head.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ch06.train_classifier_simple(model, batches(), batches(), optimizer, "cpu", 1, 5, 1)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"out_head.weight", "out_head.bias"}


def test_a_review_is_cut_or_padded_and_named():
    model = make_model()
    text = "a longer message than the row"
    ids = torch.tensor([list(text.encode())[:20]])
    with torch.no_grad():
        model.out_head.bias.copy_(torch.tensor([0.0, 100.0]))
    assert ch06.classify_review(text, model, TOKENIZER, "cpu", max_length=20, pad_token_id=256) == "spam"
    assert not model.training
    short = torch.tensor([[104, 105, *[256] * 18]])
    for message, rows in ((text, ids), ("hi", short)):
        with torch.no_grad():
            model.out_head.bias.zero_()
            wanted = ("not spam", "spam")[model(rows)[0, -1].argmax()]
        assert ch06.classify_review(message, model, TOKENIZER, "cpu", max_length=20, pad_token_id=256) == wanted


def test_a_review_needs_a_length_and_fits_the_context():
    with pytest.raises(TypeError, match="max_length"):
        ch06.classify_review("a", make_model(), TOKENIZER, "cpu")
    with pytest.raises(IndexError, match="context_length is 24"):
        ch06.classify_review("a", make_model(), TOKENIZER, "cpu", max_length=25, pad_token_id=256)


def test_the_figure_is_saved_under_its_label(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    ch06.plot_values([0, 1], [0, 10], [0.5, 0.9], [0.4, 0.8], label="accuracy")
    assert (tmp_path / "accuracy-plot.pdf").read_bytes().startswith(b"%PDF")


# Downloads.


def make_archive(path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.as_uri()


def test_the_archive_is_fetched_unpacked_and_renamed_once(tmp_path, capsys, monkeypatch):
    url = make_archive(tmp_path / "source.zip", {"SMSSpamCollection": b"ham\thello\n", "readme": b"x"})
    paths = tmp_path / "sms.zip", tmp_path / "sms", tmp_path / "sms" / "SMSSpamCollection.tsv"
    ch06.download_and_unzip_spam_data(url, *paths)
    assert read_messages(paths[2]) == [Message("ham", "hello")]
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    ch06.download_and_unzip_spam_data("https://nowhere.invalid/x.zip", *paths)
    assert capsys.readouterr().out.splitlines()[-1] == f"{paths[2]} already exists. Skipping download and extraction."


def test_without_network_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    with pytest.raises(OSError, match="FASTGPT_OFFLINE"):
        ch06.download_and_unzip_spam_data("https://x.invalid/a.zip", tmp_path / "a.zip", tmp_path / "a", tmp_path / "t")


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:\\evil", "..\\evil"])
def test_an_archive_that_reaches_outside_is_refused_whole(tmp_path, name):
    url = make_archive(tmp_path / "source.zip", {"SMSSpamCollection": b"ham\tx\n", name: b"boo"})
    with pytest.raises(ValueError, match="outside"):
        ch06.download_and_unzip_spam_data(url, tmp_path / "a.zip", tmp_path / "in" / "a", tmp_path / "t.tsv")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"source.zip", "a.zip"}


def test_a_damaged_or_foreign_archive_is_named(tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no usable zip"):
        ch06.download_and_unzip_spam_data(
            (tmp_path / "bad.zip").as_uri(), tmp_path / "a.zip", tmp_path / "a", tmp_path / "t"
        )
    url = make_archive(tmp_path / "other.zip", {"else": b""})
    with pytest.raises(ValueError, match="holds no SMSSpamCollection"):
        ch06.download_and_unzip_spam_data(url, tmp_path / "b.zip", tmp_path / "b", tmp_path / "t")


# Whole runs.

TINY = {
    "context_length": 104,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 1,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
RUN = ClassifierSettings(model=TINY, tokenizer="byte", max_length=64, epochs=5, lr=3e-3, device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on the embedded messages, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "spam"
    return finetune_classifier(dataclasses.replace(RUN, out_dir=str(folder))), folder


def test_a_run_on_the_embedded_messages_beats_the_majority_class(trained):
    result, _ = trained
    assert (result.n_train, result.n_validation, result.n_test) == (196, 28, 56)
    assert len(result.losses) == 5 * 24 and not result.interrupted
    assert result.test_accuracy >= 0.85 > result.majority_share


def test_a_saved_classifier_answers_as_the_one_that_was_trained(trained):
    result, folder = trained
    texts = ["Free prize! Text WIN77 to 55501 now", "See you at the station", "", "<|endoftext|>", "x" * 500]
    loaded = load_classifier(folder)
    assert torch.equal(loaded.probabilities(texts), result.classifier.probabilities(texts))
    assert loaded.classes == ("ham", "spam") and loaded.max_length == 64
    assert loaded.classify(texts) == [loaded.classes[i] for i in loaded.probabilities(texts).argmax(-1).tolist()]
    assert loaded.classify([]) == []


def test_a_run_leaves_the_random_numbers_alone_and_repeats_to_the_bit(trained):
    settings = dataclasses.replace(RUN, epochs=1)
    torch.manual_seed(5)
    first = finetune_classifier(settings)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert finetune_classifier(settings).losses == first.losses


class StopAt(Reporter):
    """Presses Ctrl-C, once, at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step, loss, lr):
        import signal

        if step == self.at:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_goes_on_exactly(tmp_path):
    settings = dataclasses.replace(RUN, epochs=2, model=TINY | {"drop_rate": 0.1})
    whole = finetune_classifier(settings)
    stopped = finetune_classifier(dataclasses.replace(settings, out_dir=str(tmp_path / "r")), reporter=StopAt(29))
    assert stopped.interrupted and len(stopped.losses) == 29 and math.isnan(stopped.test_accuracy)
    with pytest.raises(FileExistsError, match="resume_finetuning"):
        finetune_classifier(dataclasses.replace(settings, out_dir=str(tmp_path / "r")))
    resumed = resume_finetuning(tmp_path / "r")
    assert resumed.losses == whole.losses
    assert resumed.evaluations == whole.evaluations and resumed.test_accuracy == whole.test_accuracy


def test_resuming_with_other_data_is_refused(tmp_path):
    lines = [f"{m.label}\t{m.text}\n" for m in load_messages()]
    (tmp_path / "m.tsv").write_text("".join(lines), encoding="utf-8")
    settings = dataclasses.replace(RUN, data=str(tmp_path / "m.tsv"), out_dir=str(tmp_path / "r"))
    finetune_classifier(settings, reporter=StopAt(2))
    (tmp_path / "m.tsv").write_text("".join(lines[1:]), encoding="utf-8")
    with pytest.raises(CheckpointError, match="other data"):
        resume_finetuning(tmp_path / "r")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model to begin with."""
    torch.manual_seed(1)
    config = TINY | {"vocab_size": 257}
    path = tmp_path_factory.mktemp("base") / "best.safetensors"
    save_weights(path, GPTModel(config), {"config": config, "tokenizer": "byte"})
    return path


@pytest.mark.parametrize(
    ("trainable", "learns"),
    [
        ("head", r"out_head\."),
        ("last_block", r"out_head\.|final_norm\.|trf_blocks\.0\."),
        ("auto", r"out_head\.|final_norm\.|trf_blocks\.0\."),
        ("all", r""),
    ],
)
def test_a_base_model_learns_only_where_it_may(base, trainable, learns):
    from fastgpt.weights import load_model

    settings = ClassifierSettings(
        base=str(base), trainable=trainable, epochs=1, max_length=16, lr=1e-2, device="cpu", batch_size=32
    )
    result = finetune_classifier(settings)
    before, after = load_model(base)[0].state_dict(), result.classifier.model.state_dict()
    changed = {name for name in after if name not in before or not torch.equal(after[name], before.get(name))}
    names = {name for name, _ in result.classifier.model.named_parameters()}
    assert changed == {name for name in names if re.match(learns, name)}


def test_a_lora_run_saves_merged_weights_and_an_adapter(base, tmp_path):
    from fastgpt.finetuning import load_adapter, merge_lora
    from fastgpt.finetuning.classifier import make_classifier_model
    from fastgpt.weights import load_model

    settings = ClassifierSettings(
        base=str(base.parent), trainable="lora", lora_rank=4, epochs=1, max_length=16, out_dir=str(tmp_path / "r")
    )
    result = finetune_classifier(settings)
    model = make_classifier_model(load_model(base)[0], 2)
    load_adapter(tmp_path / "r" / loop_module.ADAPTER, model)
    merge_lora(model)
    texts = [m.text for m in load_messages()[:10]]
    merged = dataclasses.replace(result.classifier, model=model)
    assert torch.equal(merged.probabilities(texts), load_classifier(tmp_path / "r").probabilities(texts))
    assert torch.equal(merged.probabilities(texts), result.classifier.probabilities(texts))


def test_other_files_are_no_classifiers(base, tmp_path):
    with pytest.raises(CheckpointError, match="no classifier"):
        load_classifier(base)
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"trainable": "some"}, "trainable"),
        ({"trainable": "head"}, "without a base model"),
        ({"base": "x"}, "not both"),
        ({"train_frac": 0.9, "validation_frac": 0.1}, "below 1"),
        ({"max_length": 0}, "max_length"),
        ({"lora_rank": 0}, "rank"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RUN, **changes)


def test_data_that_cannot_be_learned_from_is_explained(tmp_path):
    (tmp_path / "one.tsv").write_text("ham\ta\nham\tb\n")
    with pytest.raises(ValueError, match="at least two labels; got only ham"):
        finetune_classifier(dataclasses.replace(RUN, data=str(tmp_path / "one.tsv")))
    (tmp_path / "few.tsv").write_text("ham\ta\nspam\tb\n")
    with pytest.raises(ValueError, match="part is empty"):
        finetune_classifier(dataclasses.replace(RUN, data=str(tmp_path / "few.tsv")))
    with pytest.raises(ValueError, match="max_length is 105, but the model's context_length is 104"):
        finetune_classifier(dataclasses.replace(RUN, max_length=105))


# The book's own data.


def test_the_real_messages_give_the_books_numbers(shared_data, monkeypatch, tmp_path, pandas):
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(shared_data / "gpt2_bpe"))
    path = shared_data / "sms_spam" / "SMSSpamCollection"
    frame = pandas.read_csv(path, sep="\t", header=None, names=["Label", "Text"])
    assert frame["Label"].value_counts().to_dict() == {"ham": 4825, "spam": 747}
    balanced = ch06.create_balanced_dataset(frame)
    parts = ch06.random_split(balanced, 0.7, 0.1)
    assert [len(part) for part in parts] == [1045, 149, 300]
    datasets = []
    for i, part in enumerate(parts):
        part = part.assign(Label=part["Label"].map({"ham": 0, "spam": 1}))
        part.to_csv(tmp_path / f"{i}.csv", index=None)
        longest = datasets[0].max_length if datasets else None
        datasets.append(ch06.SpamDataset(tmp_path / f"{i}.csv", get_tokenizer("gpt2"), max_length=longest))
    assert datasets[0].max_length == 120
    loaders = [DataLoader(data, batch_size=8, drop_last=i == 0) for i, data in enumerate(datasets)]
    assert [len(loader) for loader in loaders] == [130, 19, 38]
    own = split_messages(balance(read_messages(path)), 0.7, 0.1)
    for part, messages in zip(parts, own, strict=True):
        assert part["Text"].tolist() == [message.text for message in messages]


def test_a_small_run_on_the_real_messages_beats_the_majority_class(shared_data):
    settings = dataclasses.replace(
        RUN, data=str(shared_data / "sms_spam" / "SMSSpamCollection"), epochs=2, tokenizer="story"
    )
    result = finetune_classifier(settings)
    assert result.test_accuracy >= 0.85 > 0.55 > result.majority_share
