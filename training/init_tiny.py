"""
Makes an untrained mmar-tiny: its byte-level BPE tokenizer, its config and a trained small VAE in one folder, and the
latent encoder that was trained with the VAE, where there is one.

    python -m mmar.training.init_tiny --config configs/mmar-tiny --data checkpoints/emoji-lite/train.parquet \
        --vae runs/vae --out runs/init

With `--model CHECKPOINT` in place of `--vae` it is no untrained one: all weights are the checkpoint's, with a new
vocabulary for the new data, each of whose tokens starts as the mean of the old tokens that spell it.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from ..command import run_command
from ..conversion.init_from_qwen2 import load_vae_config
from ..conversion.latent_moments import check_measured
from ..conversion.models import model_class_of, open_model
from ..modeling_mmar.configuration_mmar import MMARConfig, shorten
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from ..processors.image_processing_mmar import MMARImageProcessor
from ..processors.processing_mmar import IMAGE_TOKEN, MMARProcessor
from .emoji_rows import read_rows
from .train_vae import LATENT_ENCODER_NAME


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN)


def train_tokenizer(
    texts: list[str], vocab_size: int, max_length: int, special_tokens: tuple[str, ...] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's special tokens, trained on `texts`; any string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[name for name in special_tokens if name in ("<|im_start|>", IMAGE_TOKEN)],
        model_max_length=max_length,
        padding_side="left",
    )


def spelled_by(tokenizer: PreTrainedTokenizerFast, old: PreTrainedTokenizerFast) -> list[list[int]]:
    r"""
    Spells each token of one byte-level vocabulary with those of another.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The new vocabulary, of V tokens.
        old (`PreTrainedTokenizerFast`): The one to spell with; all of its bytes are tokens.

    Returns:
        `list[list[int]]`: V lists of token ids of `old`, none empty.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    vocabulary, model = old.get_vocab(), old.backend_tokenizer.model
    return [
        [vocabulary[token]] if token in vocabulary else [piece.id for piece in model.tokenize(token)]
        for token in tokens
    ]


@torch.no_grad()
def take_weights(
    model: MMARForConditionalGeneration, old: MMARForConditionalGeneration, spelling: list[list[int]]
) -> None:
    """Gives `model` all weights of `old`; a token of its own vocabulary becomes the mean of those that spell it."""
    weights = old.state_dict()
    by_token = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    for name, weight in model.state_dict().items():
        if name in by_token:
            weight[: len(spelling)] = torch.stack([weights[name][ids].mean(dim=0) for ids in spelling])
        elif name in weights and weights[name].shape == weight.shape:
            weight.copy_(weights[name])
        else:
            came = tuple(weights[name].shape) if name in weights else "nothing of that name"
            raise ValueError(
                f"expected {shorten(name)} in --model with the shape {tuple(weight.shape)} of --config, got {came}. "
                "Pass the config that the checkpoint was made with."
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="folder with the preset's config.json")
    parser.add_argument("--data", required=True, type=Path, help="parquet whose texts train the tokenizer")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--vae", type=Path, help="diffusers folder of a trained autoencoder")
    start.add_argument("--model", type=Path, help="checkpoint whose weights to start from, VAE included")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--take_latent_encoder",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start with the latent encoder that was trained with the VAE, where there is one",
    )
    parser.add_argument(
        "--allow_unmeasured_scale", action="store_true", help="take a VAE whose latent scale was never measured"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    config = AutoConfig.from_pretrained(args.config)
    if not isinstance(config, MMARConfig):
        raise ValueError(f"expected the config of an MMAR in --config; got that of a {shorten(config.model_type)}.")
    old = None if args.model is None else open_model(args.model, "--model", dtype=torch.float32)
    vae_class = model_class_of(config).vae_class
    if old is None:
        load_vae_config(vae_class, args.vae)  # names what is of another kind
    vae = vae_class.from_pretrained(args.vae) if old is None else old.vae
    if not args.allow_unmeasured_scale:
        option = "--vae" if old is None else "--model"
        check_measured(vae.config, args.vae or args.model, option, "--allow_unmeasured_scale")
    config.vae_config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    rows = read_rows(args.data)
    processor_texts = [
        "<|im_start|>user\nGenerate an image:<|im_end|>\n<|im_start|>assistant\n",
        *(text for row in rows for text in row["captions"] + row["questions"] + row["answers"]),
    ]
    text_config = config.text_config
    tokenizer = train_tokenizer(processor_texts, text_config.vocab_size, text_config.max_position_embeddings)
    image_processor = MMARImageProcessor(size={"height": config.image_size, "width": config.image_size})
    processor = MMARProcessor(image_processor, tokenizer, num_image_tokens=config.num_latents)
    config.image_token_id = processor.image_token_id

    model = model_class_of(config)(config)
    if old is not None:
        old_tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
        take_weights(model, old, spelled_by(tokenizer, old_tokenizer))
    else:
        model.vae.load_state_dict(vae.state_dict())
    if args.take_latent_encoder and args.vae is not None and (args.vae / LATENT_ENCODER_NAME).is_file():
        try:
            model.model.latent_encoder.load_state_dict(load_file(args.vae / LATENT_ENCODER_NAME))
        except RuntimeError as error:
            raise ValueError(
                f"expected the latent encoder of --config in {shorten(str(args.vae / LATENT_ENCODER_NAME))}; it is of "
                f"other sizes ({str(error).splitlines()[-1].strip()}). Pass --no-take_latent_encoder to start without "
                "it."
            ) from error
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=32
    )
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    counts = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_children()
        if name != "lm_head"  # the embedding's weights, tied
    }
    print(json.dumps({"vocab_size": len(tokenizer), "parameters": counts}))


if __name__ == "__main__":
    run_command(main)
