"""
What generation costs beside the plain computation: each pair in turn, in one run.

    python -m mmar.benchmarks.generation --out docs/results

Widths are those of MMAR-0.5B with fewer layers and random weights. Times are CPU time of this process with one thread.
The plain protocol is the one that the tests compare every picture with, tests/parity/reference_mmar.py: the whole
sequence through the model in every round, one pass per branch of guidance, one token after the other. That both give
the same is said by tests/parity/test_reference.py and tests/unit/test_generation_benchmark.py.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from ..command import run_command
from ..conversion.init_from_qwen2 import load_preset
from ..evaluation.provenance import commit, processor, versions
from ..files import check_folder
from ..modeling_mmar.configuration_mmar import MMARConfig
from ..modeling_mmar.fast_generation_mmar import PackedLinear, can_pack
from ..modeling_mmar.modeling_mmar import MMARForConditionalGeneration
from .mar_sampler import TableSampler
from .timing import Ratio, peak_gibibytes, take_turns


SEED, GUIDANCE = 0, 3.0
REFERENCE = Path(__file__).parents[1] / "tests/parity/reference_mmar.py"
# Tokens of a prompt in MMAR's template, and of the null prompt.
NUM_TEXT, NUM_NULL = 24, 14
# A round of the paper's protocol knows half of the latents in the mean.
KNOWN_SHARE = 0.5
# What is zero in an untrained model gets this std.
STD = 0.02
NUM_TEXT_IDS = 200
NUM_STEPS = 100
NUM_NEW_TOKENS = 32


@dataclass
class Pair:
    """The same computation in two ways; `unit` is what `number` of one run is counted in."""

    name: str
    plain_name: str
    plain: Callable[[], object]
    fast: Callable[[], object]
    number: int
    unit: str
    bar: float | None = None


@dataclass
class Result:
    """Median seconds per unit of both, and how many times as fast the second is."""

    pair: Pair
    plain: float
    fast: float
    ratio: Ratio


def measure(pair: Pair, num_runs: int) -> Result:
    with torch.no_grad():
        plain, fast = take_turns([pair.plain, pair.fast], num_runs)
    ratio = Ratio.of(plain, fast)
    return Result(pair, statistics.median(plain) / pair.number, statistics.median(fast) / pair.number, ratio)


def plain_protocol() -> ModuleType:
    """The reference of the tests, as a module."""
    if not REFERENCE.is_file():
        raise ValueError(
            f"expected the plain protocol in {REFERENCE.name} of the tests; it is not there. Run the benchmark in a "
            "checkout of the repository."
        )
    spec = importlib.util.spec_from_file_location("reference_mmar", REFERENCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_model(
    config: MMARConfig, llm: int, vit: int, head: int, image_size: int | None = None, vocab: int = 256
) -> MMARForConditionalGeneration:
    """A model of the config's widths with so many layers, in which nothing is zero."""
    parts = {name: getattr(config, name).to_dict() for name in ("text_config", "vit_config", "diffusion_config")}
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "layer_types"))
    parts["text_config"] |= {**no_ids, "num_hidden_layers": llm, "vocab_size": vocab}
    parts["vit_config"]["num_hidden_layers"], parts["diffusion_config"]["num_hidden_layers"] = vit, head
    config = MMARConfig(
        **parts,
        vae_config=config.vae_config,
        image_size=config.image_size if image_size is None else image_size,
        plora_rank=config.plora_rank,
        plora_alpha=config.plora_alpha,
        image_token_id=vocab - 1,
    )
    torch.manual_seed(SEED)
    model = MMARForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("image_B", "modulation", "output_projection")):
            nn.init.normal_(parameter, std=STD)
    return model


def texts() -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, NUM_TEXT_IDS, (NUM_TEXT + NUM_NULL,), generator=generator).tolist()
    return ids[:NUM_TEXT], ids[NUM_TEXT:]


# --------------------------------------------------------------------------------------------------------------- pairs


def autoregressive_step(model: MMARForConditionalGeneration) -> Pair:
    """z of one token of a picture of which half is known, with and without the caption."""
    reference, config = plain_protocol(), model.config
    num_latents, (text, null_text) = config.num_latents, texts()
    num_known = round(KNOWN_SHARE * num_latents)
    hidden = torch.arange(num_latents)[None] >= num_known
    tokens = torch.randn(1, num_latents, config.latent_channels)
    place = num_latents - 1

    def plain() -> Tensor:
        conditions = [reference.condition(model, ids, tokens[0], hidden[0].tolist()) for ids in (text, null_text)]
        return torch.stack([z[place] for z in conditions])

    latent_encoder = model.model.latent_encoder
    padded = torch.tensor([text, [0] * (NUM_TEXT - NUM_NULL) + null_text])
    mask = (torch.arange(NUM_TEXT) >= torch.tensor([[0], [NUM_TEXT - NUM_NULL]])).long()
    with torch.no_grad():
        context = model.text_context(padded, mask, fast=True)
    positions = torch.full((2, 1), place)

    def fast() -> Tensor:
        embeds = latent_encoder(tokens, hidden, num_known)
        return context.condition(embeds.repeat(2, 1, 1), positions)[:, 0]

    return Pair("AR step", "plain protocol", plain, fast, 1, "step", bar=2.4)


def denoise_steps(model: MMARForConditionalGeneration, num_tokens: int) -> list[Pair]:
    """All diffusion steps of a round, with guidance, against the plain protocol and against MAR's design."""
    reference, head = plain_protocol(), model.diffusion_mlp
    z = torch.randn(2 * num_tokens, model.config.text_config.hidden_size)
    conditional, unconditional = z.chunk(2)

    def plain() -> Tensor:
        generator, channels = torch.Generator().manual_seed(SEED), model.config.latent_channels
        start = torch.randn(num_tokens, channels, generator=generator)
        fresh = torch.randn(NUM_STEPS - 1, num_tokens, channels, generator=generator)
        tokens = [
            reference.denoise_token(
                model,
                conditional[number],
                unconditional[number],
                GUIDANCE,
                NUM_STEPS,
                start[number],
                lambda index, number=number: fresh[index, number],
            )
            for number in range(num_tokens)
        ]
        return torch.stack(tokens)

    timesteps = reference.respaced_timesteps(model.config.diffusion_config.num_train_timesteps, NUM_STEPS)[::-1]
    schedule = torch.tensor(reference.alphas_cumprod(model.config.diffusion_config.num_train_timesteps))
    mar = TableSampler(head, schedule, timesteps)
    with torch.no_grad():
        samplers = model.token_samplers(model.default_scheduler(), {NUM_STEPS}, z.device, 2 * num_tokens, fast=True)

    def fast() -> Tensor:
        return samplers[NUM_STEPS](z, [GUIDANCE] * NUM_STEPS, [torch.Generator().manual_seed(SEED)])

    name = f"denoise step, {num_tokens} token{'s' if num_tokens > 1 else ''}"
    pairs = [
        Pair(name, "plain protocol", plain, fast, NUM_STEPS, "step", bar=1.9),
        Pair(
            name,
            "MAR's design",
            lambda: mar.sample(z, GUIDANCE, torch.Generator().manual_seed(SEED)),
            fast,
            NUM_STEPS,
            "step",
            bar=1.9,
        ),
    ]
    # The plain protocol takes one token after the other: more of them say nothing new, and take minutes.
    return pairs if num_tokens == 1 else pairs[1:]


def whole_picture(model: MMARForConditionalGeneration) -> Pair:
    """One latent a round, all diffusion steps, guidance; latents, without the VAE."""
    reference, (text, null_text) = plain_protocol(), texts()
    settings = {"num_ar_steps": model.config.num_latents, "num_inference_steps": NUM_STEPS}

    def plain() -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return reference.generate_picture(model, text, null_text, GUIDANCE, generator=generator, **settings)

    def fast() -> Tensor:
        latents = model.generate_images(
            torch.tensor([text]),
            negative_input_ids=torch.tensor([null_text]),
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(SEED)],
            output_type="latent",
            **settings,
        )
        return latents.flatten(2).transpose(1, 2)[0]

    return Pair("whole picture", "plain protocol", plain, fast, 1, "picture", bar=2.2)


def merged_against_masked(model: MMARForConditionalGeneration) -> Pair:
    """The language model on a picture's tokens: PLoRA beside the base linears, and merged into them."""
    num_latents = model.config.num_latents
    ids, mask = torch.tensor([texts()[0]]), torch.ones(1, NUM_TEXT, dtype=torch.long)
    with torch.no_grad():
        contexts = [model.text_context(ids, mask, fast) for fast in (False, True)]
    embeds = torch.randn(1, num_latents, model.config.text_config.hidden_size)
    positions = torch.arange(num_latents)[None]
    plain, fast = (lambda context=context: context.condition(embeds, positions) for context in contexts)
    return Pair("language model on image tokens, merged", "PLoRA beside the linears", plain, fast, 1, "pass")


def packed_product(num_rows: int) -> Pair:
    """The head's first linear of a block of MMAR-0.5B, as torch runs it and with packed weights."""
    linear = nn.Linear(1024, 4096)
    packed_linear = PackedLinear(linear.weight, linear.bias, num_rows)
    inputs, number = torch.randn(num_rows, 1024), max(1, 256 // num_rows)

    def repeated(run: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: [run(inputs) for _ in range(number)][-1]

    return Pair(
        f"linear of 1024 x 4096, {num_rows} rows",
        "torch",
        repeated(linear),
        repeated(packed_linear),
        number,
        "product",
    )


def text_decode(model: MMARForConditionalGeneration) -> Pair:
    """Greedy text after a prompt, against transformers' own Qwen2 with the same weights."""
    qwen2 = Qwen2ForCausalLM(model.config.text_config).eval()
    names = ("model.language_model.", "lm_head.")
    state = {name: value for name, value in model.state_dict().items() if name.startswith(names)}
    state = {
        name.replace("model.language_model.", "model."): value
        for name, value in state.items()
        if not name.endswith(("image_A", "image_B"))
    }
    qwen2.load_state_dict(state)
    arguments = {
        "input_ids": torch.tensor([texts()[0]]),
        "attention_mask": torch.ones(1, NUM_TEXT, dtype=torch.long),
        "max_new_tokens": NUM_NEW_TOKENS,
        "min_new_tokens": NUM_NEW_TOKENS,
        "do_sample": False,
        # MMAR never writes it.
        "suppress_tokens": [model.config.image_token_id],
    }
    return Pair(
        "text decode",
        "Qwen2ForCausalLM.generate",
        lambda: qwen2.generate(**arguments),
        lambda: model.generate(**arguments),
        NUM_NEW_TOKENS,
        "token",
        bar=0.97,
    )


# -------------------------------------------------------------------------------------------------------------- report


def pairs(config: MMARConfig) -> list[Callable[[], list[Pair]]]:
    """What makes the pairs, one after the other, so that few models are in memory at once."""
    vocab = config.text_config.vocab_size
    return [
        lambda: [autoregressive_step(random_model(config, llm=3, vit=2, head=1))],
        *(
            lambda number=number: denoise_steps(random_model(config, llm=1, vit=1, head=8), number)
            for number in (1, 4, 16)
        ),
        lambda: [whole_picture(random_model(config, llm=3, vit=2, head=1, image_size=64))],
        lambda: [merged_against_masked(random_model(config, llm=2, vit=1, head=1))],
        lambda: [packed_product(number) for number in (2, 32, 512)],
        lambda: [text_decode(random_model(config, llm=4, vit=1, head=1, vocab=vocab))],
    ]


def row(result: Result) -> str:
    pair = result.pair
    plain, fast = (f"{1e3 * seconds:.1f}" for seconds in (result.plain, result.fast))
    bar = "" if pair.bar is None else f"{pair.bar}"
    return f"| {pair.name} | {pair.plain_name} | {plain} | {fast} | ms per {pair.unit} | {result.ratio} | {bar} |"


HEAD = "| what | beside | that | MMAR | | times as fast | bar |\n| --- | --- | ---: | ---: | --- | ---: | ---: |"


def report(rows: list[str], num_runs: int) -> str:
    """The results as a page of docs/results."""
    packed = "with packed weights (oneDNN)" if can_pack(torch.float32) else "without packed weights"
    peak = peak_gibibytes()
    memory = "" if peak is None else f" Peak memory of the whole run {peak:.1f} GiB."
    body = "\n".join(rows)
    return f"""# Generation, on one thread

{date.today().isoformat()}, commit {commit()}, {processor()}, one thread, float32, {packed}; {versions()}.
Written by `python -m mmar.benchmarks.generation`. Widths of MMAR-0.5B with random weights: AR step and whole picture
with 3 layers of the language model, 2 of EmbeddingViT and one block of the head, an eighth of each; the picture has
16 latents, {NUM_STEPS} diffusion steps each, and its time includes merging the weights, which takes as long for 256
latents. CPU time, medians of {num_runs} runs in turn; in brackets the middle half of the ratios.{memory}

{HEAD}
{body}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_runs", type=int, default=7, help="how often each is run")
    parser.add_argument("--out", type=Path, help="folder to write the page to, as <date>_generation.md")
    arguments = parser.parse_args()
    if arguments.num_runs < 1:
        parser.error(f"--num_runs must be at least 1; got {arguments.num_runs}")
    if arguments.out is not None:
        check_folder(arguments.out)
    torch.set_num_threads(1)
    rows = []
    print(HEAD)
    for make in pairs(load_preset("mmar-0.5b")):
        for pair in make():
            rows.append(row(measure(pair, arguments.num_runs)))
            print(rows[-1], flush=True)
    page = report(rows, arguments.num_runs)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{date.today().isoformat()}_generation.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
