"""200 training steps on the embedded story: the fast model's losses follow the reference's."""

from __future__ import annotations

import torch

import fastgpt
from fastgpt import reference
from fastgpt.training import calc_loss_batch

CFG = {
    "vocab_size": 128, "context_length": 32, "emb_dim": 48, "n_heads": 4, "n_layers": 2, "drop_rate": 0.0,
    "qkv_bias": False,
}  # fmt: skip


def curve(cls: type[torch.nn.Module], dtype: torch.dtype) -> torch.Tensor:
    """The losses over windows of the story's characters, in their order, (200,)."""
    ids = torch.tensor([min(ord(letter), 127) for letter in fastgpt.load_story()])
    torch.manual_seed(0)
    model = cls(CFG).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(200):
        batch = ids[step * 128 % (len(ids) - 129) :][:129]
        optimizer.zero_grad()
        loss = calc_loss_batch(batch[:-1].view(4, 32), batch[1:].view(4, 32), model, "cpu")
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def test_200_losses_follow_the_reference_within_its_own_rounding(one_thread):
    """Rounding grows from step to step, so the reference's own distance from float64 is the measure.

    Three times its largest distance, or 2e-4 of the loss, whichever is more.
    """
    truth = curve(reference.GPTModel, torch.float64)
    naive = curve(reference.GPTModel, torch.float32)
    fast = curve(fastgpt.GPTModel, torch.float32)
    assert fast[-1] < 0.75 * fast[0]
    error, own = (fast - truth).abs().max().item(), (naive - truth).abs().max().item()
    assert error <= max(3 * own, 2e-4 * truth.max().item()), (error, own)
