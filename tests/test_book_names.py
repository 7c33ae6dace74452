"""Every name of the book can be imported from fastgpt.book, with the book's arguments, order and defaults.

Where fastgpt takes more, the additions have defaults and come last or by keyword only, so that the book's calls work.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection
from typing import Any

import pytest

# module: name(arguments), as the book's repository has them; a name without parentheses is not called.
BOOK = {
    "ch02": """
        SimpleTokenizerV1(vocab)
        SimpleTokenizerV1.encode(self, text)
        SimpleTokenizerV1.decode(self, ids)
        SimpleTokenizerV2(vocab)
        SimpleTokenizerV2.encode(self, text)
        SimpleTokenizerV2.decode(self, ids)
        GPTDatasetV1(txt, tokenizer, max_length, stride)
        create_dataloader_v1(txt, batch_size=4, max_length=256, stride=128, shuffle=True, drop_last=True, num_workers=0)
        BPETokenizerSimple()
        BPETokenizerSimple.train(self, text, vocab_size, allowed_special={"<|endoftext|>"})
        BPETokenizerSimple.encode(self, text, allowed_special=None)
        BPETokenizerSimple.decode(self, token_ids)
        BPETokenizerSimple.save_vocab_and_merges(self, vocab_path, bpe_merges_path)
        BPETokenizerSimple.load_vocab_and_merges(self, vocab_path, bpe_merges_path)
        BPETokenizerSimple.load_vocab_and_merges_from_openai(self, vocab_path, bpe_merges_path)
        BPETokenizerSimple.tokenize_with_bpe(self, token)
        BPETokenizerSimple.get_special_token_id(self, token)
        BPETokenizerSimple.pretokenize_text(text)
        BPETokenizerSimple.find_freq_pair(token_id_sequences, mode="most")
        BPETokenizerSimple.replace_pair(token_id_sequences, pair_id, new_id)
        Encoder(encoder, bpe_merges, errors="replace")
        get_encoder(model_name, models_dir)
    """,
    "ch03": """
        SelfAttention_v1(d_in, d_out)
        SelfAttention_v2(d_in, d_out, qkv_bias=False)
        CausalAttention(d_in, d_out, context_length, dropout, qkv_bias=False)
        MultiHeadAttentionWrapper(d_in, d_out, context_length, dropout, num_heads, qkv_bias=False)
        MultiHeadAttention(d_in, d_out, context_length, dropout, num_heads, qkv_bias=False)
        PyTorchMultiHeadAttention(d_in, d_out, num_heads, dropout=0.0, qkv_bias=False)
        Ch03_MHA_Wrapper(d_in, d_out, context_length, dropout, num_heads, qkv_bias=False)
        Ch03_MHA(d_in, d_out, context_length, dropout, num_heads, qkv_bias=False)
        MultiHeadAttentionCombinedQKV(d_in, d_out, num_heads, context_length, dropout=0.0, qkv_bias=False)
        MHAEinsum(d_in, d_out, context_length, dropout, num_heads, qkv_bias=False)
        MHAPyTorchScaledDotProduct(d_in, d_out, num_heads, context_length, dropout=0.0, qkv_bias=False)
        MHAPyTorchSDPAWithoutFlash(d_in, d_out, num_heads, context_length, dropout=0.0, qkv_bias=False)
        MHAPyTorchClass(d_in, d_out, num_heads, context_length, dropout=0.0, qkv_bias=False, need_weights=True)
        MHAPyTorchFlexAttention(d_in, d_out, num_heads, context_length, dropout=0.0, qkv_bias=False)
    """,
    "ch04": """
        GPT_CONFIG_124M
        LayerNorm(emb_dim)
        GELU()
        FeedForward(cfg)
        TransformerBlock(cfg)
        GPTModel(cfg)
        GPTModel.forward(self, in_idx)
        GPTModelFast(cfg)
        TransformerBlockFast(cfg)
        FeedForwardFast(cfg)
        MultiHeadAttention(d_in, d_out, context_length, dropout, num_heads, qkv_bias=False)
        DummyGPTModel(cfg)
        DummyTransformerBlock(cfg)
        DummyLayerNorm(normalized_shape, eps=1e-5)
        ExampleDeepNeuralNetwork(layer_sizes, use_shortcut)
        generate_text_simple(model, idx, max_new_tokens, context_size)
    """,
    "ch05": """
        text_to_token_ids(text, tokenizer)
        token_ids_to_text(token_ids, tokenizer)
        calc_loss_batch(input_batch, target_batch, model, device)
        calc_loss_loader(data_loader, model, device, num_batches=None)
        evaluate_model(model, train_loader, val_loader, device, eval_iter)
        train_model_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter, \
                           start_context, tokenizer)
        generate_and_print_sample(model, tokenizer, device, start_context)
        generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None)
        generate_text_simple(model, idx, max_new_tokens, context_size)
        assign(left, right)
        load_weights_into_gpt(gpt, params)
        download_and_load_gpt2(model_size, models_dir)
        download_file(url, destination, backup_url=None)
        load_gpt2_params_from_tf_ckpt(ckpt_path, settings)
        plot_losses(epochs_seen, tokens_seen, train_losses, val_losses)
        print_sampled_tokens(probas)
        softmax_with_temperature(logits, temperature)
    """,
    "ch06": """
        download_and_unzip_spam_data(url, zip_path, extracted_path, data_file_path)
        create_balanced_dataset(df)
        random_split(df, train_frac, validation_frac)
        SpamDataset(csv_file, tokenizer, max_length=None, pad_token_id=50256)
        calc_accuracy_loader(data_loader, model, device, num_batches=None)
        calc_loss_batch(input_batch, target_batch, model, device)
        calc_loss_loader(data_loader, model, device, num_batches=None)
        evaluate_model(model, train_loader, val_loader, device, eval_iter)
        train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter)
        plot_values(epochs_seen, examples_seen, train_values, val_values, label="loss")
        classify_review(text, model, tokenizer, device, max_length=None, pad_token_id=50256)
    """,
    "ch07": """
        download_and_load_file(file_path, url)
        format_input(entry)
        InstructionDataset(data, tokenizer)
        custom_collate_draft_1(batch, pad_token_id=50256, device="cpu")
        custom_collate_draft_2(batch, pad_token_id=50256, device="cpu")
        custom_collate_fn(batch, pad_token_id=50256, ignore_index=-100, allowed_max_length=None, device="cpu")
        check_if_running(process_name)
        query_model(prompt, model="llama3", url="http://localhost:11434/api/chat")
        generate_model_scores(json_data, json_key, model="llama3")
        PreferenceDataset(data, tokenizer)
        compute_dpo_loss(model_chosen_logprobs, model_rejected_logprobs, reference_chosen_logprobs, \
                         reference_rejected_logprobs, beta=0.1)
        compute_logprobs(logits, labels, selection_mask=None)
        compute_dpo_loss_batch(batch, policy_model, reference_model, beta)
        compute_dpo_loss_loader(data_loader, policy_model, reference_model, beta, num_batches=None)
        evaluate_dpo_loss_loader(policy_model, reference_model, train_loader, val_loader, beta, eval_iter)
        train_model_dpo_simple(policy_model, reference_model, train_loader, val_loader, optimizer, num_epochs, beta, \
                               eval_freq, eval_iter, start_context, tokenizer)
    """,
    "ch07_dpo": """
        format_input(entry)
        PreferenceDataset(data, tokenizer)
        custom_collate_fn(batch, pad_token_id=50256, allowed_max_length=None, mask_prompt_tokens=True, device="cpu")
        compute_dpo_loss_batch(batch, policy_model, reference_model, beta)
    """,
    "appendix_a": """
        NeuralNetwork(num_inputs, num_outputs)
        ToyDataset(X, y)
        compute_accuracy(model, dataloader)
        ddp_setup(rank, world_size)
        prepare_dataset()
        main(rank, world_size, num_epochs)
    """,
    "appendix_d": """
        find_highest_gradient(model)
        train_model(model, train_loader, val_loader, optimizer, device, n_epochs, eval_freq, eval_iter, start_context, \
                    tokenizer, warmup_steps, initial_lr=3e-05, min_lr=1e-6, orig_book_version=False)
    """,
    "appendix_e": """
        LoRALayer(in_dim, out_dim, rank, alpha)
        LinearWithLoRA(linear, rank, alpha)
        LinearWithLoRAMerged(linear, rank, alpha)
        replace_linear_with_lora(model, rank, alpha)
    """,
    "generate": """
        trim_input_tensor(input_ids_tensor, context_len, max_new_tokens)
    """,
    "kv_cache.utils": """
        KVCache(n_layers)
        KVCache.get(self, layer_idx)
        KVCache.update(self, layer_idx, value)
        KVCache.get_all(self)
        KVCache.reset(self)
    """,
    "kv_cache.gpt2": """
        GPTModel(cfg)
        GPTModel.forward(self, in_idx, use_cache=False, cache=None)
        GPTModel.reset_kv_cache(self)
        MultiHeadAttention.forward(self, x, use_cache=False)
        MultiHeadAttention.reset_cache(self)
    """,
    "kv_cache.generate": """
        generate_text_simple(model, idx, max_new_tokens, context_size=None, use_cache=True)
        generate_text_simple_cached(model, idx, max_new_tokens, context_size=None, use_cache=True)
        generate_text_simple_stream(model, token_ids, max_new_tokens, eos_token_id=None, context_size=None)
        trim_input_tensor(input_ids_tensor, context_len, max_new_tokens)
    """,
}

# Modules and parameters that must not be confused: the same name in two chapters, with two meanings.
TWINS = [
    ("ch05", "ch06", "calc_loss_batch"),
    ("ch05", "ch06", "calc_loss_loader"),
    ("ch05", "ch06", "evaluate_model"),
    ("ch07", "ch07_dpo", "custom_collate_fn"),
    ("ch04", "kv_cache.gpt2", "GPTModel"),
    ("ch04", "kv_cache.generate", "generate_text_simple"),
]

ROWS = [
    (module, line.strip())
    for module, text in BOOK.items()
    for line in text.replace("\\\n", "").splitlines()
    if line.strip()
]


def lookup(module: str, path: str) -> Any:
    found: Any = importlib.import_module(f"fastgpt.book.{module}")
    for part in path.split("."):
        found = getattr(found, part)
    return found


def comparable(default: Any) -> Any:
    return set(default) if isinstance(default, Collection) and not isinstance(default, str) else default


def arguments_of(function: Any) -> list[inspect.Parameter]:
    # Modules without an __init__ of their own show nn.Module's (*args, **kwargs).
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind not in variadic]


@pytest.mark.parametrize(("module", "row"), ROWS, ids=[f"{module}.{row.partition('(')[0]}" for module, row in ROWS])
def test_the_name_has_the_books_arguments_and_defaults(module, row):
    path, called, arguments = row.partition("(")
    found = lookup(module, path)
    if not called:
        return
    namespace: dict[str, Any] = {}
    exec(f"def book({arguments}: pass", namespace)
    wanted = arguments_of(namespace["book"])
    got = arguments_of(found)
    assert [p.name for p in got[: len(wanted)]] == [p.name for p in wanted]
    for ours, book in zip(got, wanted, strict=False):
        assert comparable(ours.default) == comparable(book.default), ours.name
        assert ours.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, ours.name
    for added in got[len(wanted) :]:
        assert added.default is not inspect.Parameter.empty, f"{added.name} is not the book's and has no default"


@pytest.mark.parametrize("module", BOOK)
def test_all_names_of_the_module_that_the_book_has_are_exported(module):
    names = {row.partition("(")[0].partition(".")[0] for where, row in ROWS if where == module}
    assert names <= set(importlib.import_module(f"fastgpt.book.{module}").__all__)


@pytest.mark.parametrize(("one", "other", "name"), TWINS)
def test_a_name_with_two_meanings_keeps_both(one, other, name):
    assert lookup(one, name) is not lookup(other, name)
