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
from .evaluate import is_right, kind_of_question


IMAGE_TOKEN = "<|image|>"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN]
CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
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
# What `cross_entropy` leaves out.
IGNORED = -100
# The training is resumed from its last save; both are multiples of `BATCHES_PER_SORT`.
REPORT_STEPS, SAVE_STEPS = 80, 400
# Dialogues that the tokenizer is trained on, and whose lengths are sorted at a time.
NUM_TOKENIZER_DIALOGUES = 20_000
BATCHES_PER_SORT = 8
# Lengths are padded to multiples of it: matrix kernels are compiled anew for each shape.
LENGTH_STEP = 16
# Seeds of training and of measurement.
TRAIN_SEED, TEST_SEED = 10, 11


def dialogue_text(seed: int, number: int) -> tuple[str, list[tuple[int, int]]]:
    """A dialogue and where notes of the user stand in it; see `as_text`."""
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


def encode(tokenizer: PreTrainedTokenizerFast, text: str, shown: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels `(L,)` of a dialogue; what the user shows is not learned."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"])
    labels = ids.clone()
    for place, (first, last) in enumerate(encoded["offset_mapping"]):
        if any(start <= first and last <= end for start, end in shown):
            labels[place] = IGNORED
    return ids, labels


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, first: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """`BATCHES_PER_SORT` batches of ids and labels, padded on the right, of dialogues of like length."""
    numbers = range(first, first + BATCHES_PER_SORT * batch_size)
    rows = [encode(tokenizer, *dialogue_text(seed, number)) for number in numbers]
    rows.sort(key=lambda row: len(row[0]))
    made = []
    for start in range(0, len(rows), batch_size):
        parts = zip(*rows[start : start + batch_size], strict=True)
        # Padding on the right is seen by nothing before it.
        made.append(tuple(_padded(part, value) for part, value in zip(parts, (0, IGNORED), strict=True)))
    order = np.random.default_rng([seed, first]).permutation(len(made))
    return [made[i] for i in order]


def _padded(rows: tuple[Tensor, ...], value: int) -> Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    return F.pad(padded, (0, -padded.shape[1] % LENGTH_STEP), value=value)


def loss_of(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labelled tokens, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_dialogues: int = 300) -> dict[str, float]:
    """The loss on new dialogues, and the share of questions about notes that are answered rightly, by kind."""
    model.eval()
    losses = [loss_of(model, *batch).item() for batch in batches(tokenizer, TEST_SEED, 0, 32)]
    right = {}
    for number in range(num_dialogues):
        generator = np.random.default_rng([TEST_SEED, 100_000 + number])
        turns = sample_dialogue(generator, kind="read")[:2]
        text = as_text(turns[:1], generator)[0] + "<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        written = model.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
        asked, answer = turns[0].items[-1], turns[1].items[0]
        said = tokenizer.decode(written, skip_special_tokens=True).strip()
        scene = turns[0].items[0]
        right.setdefault(kind_of_question(asked), []).append(is_right(scene, asked, answer, said))
    return {"loss": float(np.mean(losses)), **{name: float(np.mean(values)) for name, values in right.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--num_steps", type=int, default=3200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2.0e-3)
    parser.add_argument("--compile", action="store_true", help="compile each layer; needs a C++ compiler")
    parser.add_argument("--bf16", action="store_true", help="for a CPU with instructions for bfloat16; slow on others")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.num_steps % BATCHES_PER_SORT:
        parser.error(f"--num_steps must be a multiple of {BATCHES_PER_SORT}")
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer([dialogue_text(TRAIN_SEED, number)[0] for number in range(NUM_TOKENIZER_DIALOGUES)])
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
    state_file, step, total = args.out / "training_state.pt", 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
    begin = time.monotonic()
    while step < args.num_steps:
        for batch in batches(tokenizer, TRAIN_SEED, step * args.batch_size, args.batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = loss_of(model, *batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total, step = total + loss.item(), step + 1
            if step % REPORT_STEPS == 0:
                seconds = time.monotonic() - begin
                print(f"step {step} loss {total / REPORT_STEPS:.4f} seconds {seconds:.0f}", flush=True)
                total = 0.0
        if step % SAVE_STEPS == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "step": step}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
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
