"""
Trains the small Qwen2 of the scenes on texts alone: dialogues in which notes stand in place of images.

    python -m examples.scenes.train_language_model --out runs/scenes/language_model

Its weights are rounded to bfloat16 at the end, the type in which they are published, and stay frozen afterwards.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .dialogues import as_text, sample_dialogue


IMAGE_TOKEN = "<|image|>"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN]
CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    # The paper's backbone is far wider: one over the square root of the width.
    "initializer_range": 0.06,
}
VOCAB_SIZE = 512
# Dialogues that the tokenizer is trained on, and whose lengths are sorted at a time.
NUM_TOKENIZER_DIALOGUES = 20_000
BATCHES_PER_SORT = 8
# Lengths are padded to multiples of it: matrix kernels are compiled anew for each shape.
LENGTH_STEP = 16
# Seeds of training and of measurement.
TRAIN_SEED, TEST_SEED = 10, 11


def dialogue_text(seed: int, number: int) -> str:
    generator = np.random.default_rng([seed, number])
    return as_text(sample_dialogue(generator), generator)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's special tokens; any string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = [text.replace("<|im_start|>", "").replace("<|im_end|>", "") for text in texts]
    tokenizer.train_from_iterator(plain, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", IMAGE_TOKEN],
        model_max_length=CONFIG["max_position_embeddings"],
        padding_side="left",
    )


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, first: int, batch_size: int) -> list[Tensor]:
    """`BATCHES_PER_SORT` batches of token ids, padded on the right with -100, of dialogues of like length."""
    numbers = range(first, first + BATCHES_PER_SORT * batch_size)
    ids = sorted((tokenizer(dialogue_text(seed, number))["input_ids"] for number in numbers), key=len)
    made = []
    for start in range(0, len(ids), batch_size):
        rows = [torch.tensor(row) for row in ids[start : start + batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        made.append(F.pad(padded, (0, -padded.shape[1] % LENGTH_STEP), value=-100))
    order = np.random.default_rng([seed, first]).permutation(len(made))
    return [made[i] for i in order]


def loss_of(model: Qwen2ForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross entropy of all tokens but the first, in nats."""
    logits = model(input_ids=ids.clamp_min(0), use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_dialogues: int = 300) -> dict[str, float]:
    """The loss on new dialogues, and the share of questions about notes that are answered word by word."""
    model.eval()
    losses = [loss_of(model, ids).item() for ids in batches(tokenizer, TEST_SEED, 0, 32)]
    right = {}
    for number in range(num_dialogues):
        generator = np.random.default_rng([TEST_SEED, 100_000 + number])
        turns = sample_dialogue(generator, kind="read")[:2]
        text = as_text(turns[:1], generator) + "<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        written = model.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
        asked, answer = turns[0].items[-1], turns[1].items[0]
        # Descriptions have several right wordings; their words are compared apart from the order.
        said = tokenizer.decode(written, skip_special_tokens=True).strip()
        first_word = asked.split()[0]
        right.setdefault(first_word, []).append(said == answer)
    return {"loss": float(np.mean(losses)), **{name: float(np.mean(values)) for name, values in right.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--num_steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2.0e-3)
    parser.add_argument("--compile", action="store_true", help="compile each layer; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer([dialogue_text(TRAIN_SEED, number) for number in range(NUM_TOKENIZER_DIALOGUES)])
    config = Qwen2Config(
        **CONFIG,
        vocab_size=VOCAB_SIZE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Eager: on a CPU, SDPA's backward of many short rows is slower.
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="eager").train()
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.num_steps, pct_start=0.03)
    begin, total = time.monotonic(), 0.0
    step = 0
    while step < args.num_steps:
        for ids in batches(tokenizer, TRAIN_SEED, step * args.batch_size, args.batch_size):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, ids)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total, step = total + loss.item(), step + 1
            if step % 50 == 0:
                print(f"step {step} loss {total / 50:.4f} seconds {time.monotonic() - begin:.0f}", flush=True)
                total = 0.0
            if step == args.num_steps:
                break
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report = measure(model.float(), tokenizer)
    (args.out / "report.json").write_text(json.dumps({"steps": args.num_steps, **report}, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
