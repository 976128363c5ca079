"""A small GPT-2 on speeches of Tiny Shakespeare, character by character: trains it and is its own
task file.

```sh
LCA_DATA=DIR python docs/examples/tiny_shakespeare.py shakespeare-checkpoints
LCA_DATA=DIR lca run shakespeare-checkpoints --task docs/examples/tiny_shakespeare.py --loss all
```

DIR holds `tinyshakespeare.txt` of karpathy/char-rnn. Needs `transformers`; the model is built from
its configuration, nothing is downloaded. Checkpoints lie as Hugging Face's Trainer leaves them:
`checkpoint-N/model.safetensors`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from lca_posthoc import Loss, Task

ITERATES = 60
BATCH = 32
LENGTH = 64
SPEAKERS = ("DUKE VINCENTIO", "GLOUCESTER", "MENENIUS", "ROMEO")
SPEECHES = 32  # of each speaker
CONFIG = GPT2Config(
    vocab_size=65,
    n_positions=LENGTH,
    n_embd=64,
    n_layer=2,
    n_head=4,
    resid_pdrop=0.1,
    embd_pdrop=0.1,
    attn_pdrop=0.1,
    tie_word_embeddings=True,
    use_cache=False,
    bos_token_id=0,
    eos_token_id=0,
)


def build() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(CONFIG)


def data() -> tuple[dict[str, Tensor], list[str]]:
    """The first speeches of each speaker, cut or padded to 64 characters, (N, 64) with a mask; and
    who speaks each.
    """
    if "LCA_DATA" not in os.environ:
        raise RuntimeError("set LCA_DATA to the directory that holds tinyshakespeare.txt")
    text = (Path(os.environ["LCA_DATA"]) / "tinyshakespeare.txt").read_text()
    code = {character: number for number, character in enumerate(sorted(set(text)))}
    spoken: dict[str, list[str]] = {speaker: [] for speaker in SPEAKERS}
    for block in text.split("\n\n"):
        speaker, _, speech = block.partition(":\n")
        if speaker in spoken and len(spoken[speaker]) < SPEECHES:
            spoken[speaker].append(speech[:LENGTH])
    speeches = [speech for speaker in SPEAKERS for speech in spoken[speaker]]
    ids = torch.zeros(len(speeches), LENGTH, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, speech in enumerate(speeches):
        ids[row, : len(speech)] = torch.tensor([code[character] for character in speech])
        mask[row, : len(speech)] = 1
    return {"input_ids": ids, "attention_mask": mask}, [
        speaker for speaker in SPEAKERS for _ in spoken[speaker]
    ]


def next_character(model: GPT2LMHeadModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every character but a speech's first, (N, 63), and its weight: 1, or 0 where
    there is only padding.
    """
    logits = model(**batch).logits[:, :-1]
    values = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return values, batch["attention_mask"][:, 1:]


def task() -> Task:
    """The mean over all characters, and the mean over each speaker's: one pass over the data gives
    both.
    """
    speeches, speakers = data()
    return Task(
        model=build,
        data={"train": speeches},
        losses={
            "train": Loss(call=next_character, on="train"),
            "speakers": Loss(call=next_character, on="train", group_by=speakers),
        },
    )


def train(directory: str) -> None:
    """AdamW, learning rate 1e-3 after 10 steps of warm-up, batches of 32 speeches: dropout is on
    here and off in the replay.
    """
    disable_progress_bar()
    torch.manual_seed(0)
    speeches, _ = data()
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    model.save_pretrained(f"{directory}/checkpoint-0")
    for step in range(1, ITERATES + 1):
        rows = torch.randperm(len(speeches["input_ids"]))[:BATCH]
        batch = {name: each[rows] for name, each in speeches.items()}
        values, weights = next_character(model, batch)
        loss = (values * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        model.save_pretrained(f"{directory}/checkpoint-{step}")
        if step % 20 == 0:
            print(f"step {step}: loss of the batch {loss.item():.4f}")


if __name__ == "__main__":
    train(sys.argv[1])
