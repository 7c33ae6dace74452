"""Preference tuning: collation and masks, log-probabilities, the DPO loss against its formula, and a short training."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from torch.utils.data import DataLoader

from fastgpt.book.ch07_dpo import (
    PreferenceDataset,
    compute_dpo_loss,
    compute_dpo_loss_batch,
    compute_dpo_loss_loader,
    compute_logprobs,
    custom_collate_fn,
    evaluate_dpo_loss_loader,
    format_input,
    train_model_dpo_simple,
)
from fastgpt.model import GPTModel
from fastgpt.tokenizer import ByteTokenizer, get_tokenizer

TOKENIZER = ByteTokenizer()
CFG = {
    "vocab_size": 257,
    "context_length": 256,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 1,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
ENTRIES = [
    {"instruction": "Greet.", "input": "", "output": "Hi.", "chosen": "Good morning.", "rejected": "What?"},
    {"instruction": "Add.", "input": "1, 2", "output": "3", "chosen": "The sum is 3.", "rejected": "Do it yourself."},
    {"instruction": "Name a fruit.", "input": "", "output": "Pear", "chosen": "A pear.", "rejected": "No."},
]


def make_model(seed: int = 0) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(CFG)


def loader(batch_size: int = 2) -> DataLoader:
    data = PreferenceDataset(ENTRIES, TOKENIZER)
    return DataLoader(data, batch_size=batch_size, collate_fn=lambda batch: custom_collate_fn(batch, pad_token_id=256))


def test_the_dataset_puts_the_prompt_before_both_answers():
    data = PreferenceDataset(ENTRIES, TOKENIZER)
    prompt = format_input(ENTRIES[1])
    assert TOKENIZER.decode(data[1]["prompt"]) == prompt
    assert TOKENIZER.decode(data[1]["chosen"]) == f"{prompt}\n\n### Response:\nThe sum is 3."
    assert TOKENIZER.decode(data[1]["rejected"]) == f"{prompt}\n\n### Response:\nDo it yourself."
    assert len(data) == 3


def test_the_collation_pads_and_masks_by_hand():
    batch = [
        {"prompt": [1, 2], "chosen": [1, 2, 8, 8, 3], "rejected": [1, 2, 8, 8, 4, 5]},
        {"prompt": [6], "chosen": [6, 8, 8, 7, 7, 7], "rejected": [6, 8, 8, 9]},
    ]
    got = custom_collate_fn(batch, pad_token_id=0)
    assert [row.tolist() for row in got["prompt"]] == [[1, 2], [6]]
    assert got["chosen"].tolist() == [[1, 2, 8, 8, 3, 0, 0], [6, 8, 8, 7, 7, 7, 0]]
    assert got["rejected"].tolist() == [[1, 2, 8, 8, 4, 5, 0], [6, 8, 8, 9, 0, 0, 0]]
    assert got["chosen_mask"].int().tolist() == [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0]]
    assert got["rejected_mask"].int().tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]]


def test_the_prompt_can_count_and_rows_can_be_cut():
    batch = [{"prompt": [1, 2], "chosen": [1, 2, 8, 8, 3], "rejected": [1, 2, 8]}]
    got = custom_collate_fn(batch, pad_token_id=0, allowed_max_length=4, mask_prompt_tokens=False)
    assert got["chosen"].tolist() == [[1, 2, 8, 8]]
    assert got["rejected_mask"].int().tolist() == [[1, 1, 1, 0]]


def test_logprobs_are_the_mean_over_the_tokens_that_count():
    torch.manual_seed(1)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    got = compute_logprobs(logits, labels, mask)
    table = torch.log_softmax(logits.double(), dim=-1)
    wanted = [
        sum(table[row, i - 1, labels[row, i]] for i in columns) / len(columns)
        for row, columns in ((0, [2, 3]), (1, [1, 2, 3, 4]))
    ]
    torch.testing.assert_close(got.double(), torch.stack(wanted), atol=1e-6, rtol=0)
    torch.testing.assert_close(compute_logprobs(logits, labels)[1], got[1])


def test_the_loss_is_the_papers_formula():
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    reference_chosen, reference_rejected = torch.tensor([-1.2, -2.5]), torch.tensor([-1.1, -1.3])
    loss, chosen_reward, rejected_reward = compute_dpo_loss(
        chosen, rejected, reference_chosen, reference_rejected, beta=0.5
    )
    margins = [(-1.0 + 1.5) - (-1.2 + 1.1), (-2.0 + 1.0) - (-2.5 + 1.3)]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-0.5 * m)) for m in margins) / 2, abs=1e-6)
    assert chosen_reward.item() == pytest.approx((0.2 + 0.5) / 2, abs=1e-6)
    assert rejected_reward.item() == pytest.approx((-0.4 + 0.3) / 2, abs=1e-6)


def test_rewards_carry_no_graph():
    chosen = torch.tensor([-1.0], requires_grad=True)
    loss, *rewards = compute_dpo_loss(chosen, chosen * 2, torch.zeros(1), torch.zeros(1))
    assert loss.requires_grad and not any(reward.requires_grad for reward in rewards)


def test_a_policy_equal_to_its_reference_has_the_loss_ln_2():
    model = make_model().eval()
    loss, chosen, rejected = compute_dpo_loss_batch(next(iter(loader())), model, model, beta=0.1)
    assert loss.item() == pytest.approx(math.log(2)) and chosen == rejected == 0


def test_the_reference_model_gets_no_gradient():
    policy, frozen = make_model(0), make_model(1)
    compute_dpo_loss_batch(next(iter(loader())), policy, frozen, beta=0.1)[0].backward()
    assert all(p.grad is not None for p in policy.trf_blocks.parameters())
    assert all(p.grad is None for p in frozen.parameters())


def test_a_loader_gives_the_mean_of_its_batches():
    policy, frozen = make_model(0).eval(), make_model(1).eval()
    rows = [torch.stack(compute_dpo_loss_batch(batch, policy, frozen, 0.1)).tolist() for batch in loader()]
    wanted = [sum(column) / 2 for column in zip(*rows, strict=True)]
    assert compute_dpo_loss_loader(loader(), policy, frozen, 0.1) == pytest.approx(wanted, abs=1e-6)
    assert compute_dpo_loss_loader(loader(), policy, frozen, 0.1, num_batches=1) == pytest.approx(rows[0], abs=1e-6)
    assert all(map(math.isnan, compute_dpo_loss_loader([], policy, frozen, 0.1)))


def test_evaluation_ends_in_training_mode():
    policy = make_model().eval()
    row = evaluate_dpo_loss_loader(policy, policy, loader(), loader(), beta=0.1, eval_iter=1)
    assert policy.training
    assert list(row) == [f"{p}_{n}" for p in ("train", "val") for n in ("loss", "chosen_reward", "rejected_reward")]


def test_training_makes_chosen_answers_likelier_than_rejected_ones(capsys):
    policy = make_model()
    frozen = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    tracking = train_model_dpo_simple(
        policy, frozen, loader(), loader(), optimizer, 4, 0.5, 2, None, format_input(ENTRIES[0]), TOKENIZER
    )
    assert set(tracking) == {
        "train_losses",
        "train_chosen_rewards",
        "train_rejected_rewards",
        "val_losses",
        "val_chosen_rewards",
        "val_rejected_rewards",
        "tokens_seen",
    }
    assert all(len(values) == 4 for values in tracking.values())
    assert tracking["val_losses"] == sorted(tracking["val_losses"], reverse=True)
    assert tracking["val_losses"][-1] < 0.62 < math.log(2)
    assert tracking["val_chosen_rewards"][-1] > tracking["val_rejected_rewards"][-1]
    line = r"^Ep 2 \(Step 000002\): Train loss \d\.\d{3}, Val loss \d\.\d{3}, "
    assert re.search(
        line + r"Train reward margins -?\d\.\d{3}, Val reward margins -?\d\.\d{3}$", capsys.readouterr().out, re.M
    )


def test_the_mask_begins_with_the_heading_of_the_answer_on_real_data(shared_data, monkeypatch):
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(shared_data / "gpt2_bpe"))
    tokenizer = get_tokenizer("gpt2")
    entries = json.loads((shared_data / "instruction-data-with-preference.json").read_text("utf-8"))
    assert len(entries) == 1100
    batch = custom_collate_fn(list(PreferenceDataset(entries[:8], tokenizer)))
    for i, entry in enumerate(entries[:8]):
        for key in ("chosen", "rejected"):
            ids = batch[key][i][batch[f"{key}_mask"][i]]
            assert tokenizer.decode(ids.tolist()) == f"### Response:\n{entry[key]}"
