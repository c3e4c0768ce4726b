"""
What training leaves out, and what that saves: each against the plain computation, side by side in one run.

    python -m mmar.benchmarks.training_savings --out docs/results

Sizes are those of MMAR-0.5B with fewer layers. Times are CPU time of this process with one thread, forward and
backward pass, medians of runs in turn; that the gradients are the same says tests/unit/test_training_savings.py.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..command import run_command
from ..conversion.init_from_qwen2 import load_preset
from ..evaluation.provenance import commit, processor, versions
from ..files import check_folder
from ..modeling_mmar.configuration_mmar import MMARConfig
from ..modeling_mmar.diffusion_mmar import MMARDiffusionMLP, cosine_alphas_cumprod, diffusion_losses
from ..modeling_mmar.embedding_vit_mmar import MMARLatentEncoder
from ..modeling_mmar.masking_mmar import image_block_ids, shared_position_ids
from ..modeling_mmar.modeling_mmar import MMARAutoencoderKL
from ..modeling_mmar.plora_mmar import MMARQwen2Model, PLoRALinear
from ..modeling_mmar.prefix_mmar import MIN_PREFIX_SHARE
from .timing import medians


SEED = 0
# Rows of a batch of the language model.
NUM_ROWS = 2
# Qwen2's template before the picture of a question, and before a caption; the latter ends with ten tokens more.
QUESTION_PREFIX, CAPTION_PREFIX = 14, 24
# Shares of hidden latents: the mean of a normal of mean 1 and std 0.25 below 1 is 1 - 0.25 sqrt(2 / pi) = 0.80.
HIDDEN_SHARE = 0.8
# The paper's learning rate of stage 1 (Sec. 4.2): what AdamW's first step makes of B, which begins as zeros.
LEARNING_RATE = 5e-5
MEGA, GIGA = 1e6, 1e9


@dataclass
class Comparison:
    """The same losses in two ways; `modules` hold the weights, which are not counted as kept for backward."""

    name: str
    sizes: str
    plain: Callable[[], Tensor]
    saving: Callable[[], Tensor]
    modules: tuple[nn.Module, ...]


@dataclass
class Result:
    """Medians in seconds, and bytes kept for the backward pass, of the plain computation and of the other."""

    name: str
    sizes: str
    seconds: tuple[float, float]
    kept: tuple[int, int]


def kept_bytes(loss: Callable[[], Tensor], modules: tuple[nn.Module, ...]) -> int:
    """Bytes of the tensors, other than weights, that a forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept_alive = loss()
    del kept_alive
    return sum(kept.values())


def compare(comparison: Comparison, num_runs: int) -> Result:
    ways = (comparison.plain, comparison.saving)
    kept = tuple(kept_bytes(way, comparison.modules) for way in ways)
    seconds = medians([lambda way=way: way().backward() for way in ways], num_runs)
    for module in comparison.modules:
        module.zero_grad()
    return Result(comparison.name, comparison.sizes, tuple(seconds), kept)


# ------------------------------------------------------------------------------------------------------------- batches


def rows_of_text(before: int, after: int, num_latents: int, num_rows: int = NUM_ROWS) -> Tensor:
    """Where image tokens are, `(num_rows, before + N + after)`: one picture per row."""
    is_image = torch.zeros(num_rows, before + num_latents + after, dtype=torch.bool)
    is_image[:, before : before + num_latents] = True
    return is_image


def language_model(config: MMARConfig, num_layers: int) -> MMARQwen2Model:
    """Frozen but for PLoRA, whose B is not zero."""
    # Without a vocabulary, embeddings are given.
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "layer_types"))
    changes = {**tokens, "vocab_size": 1, "num_hidden_layers": num_layers}
    text = type(config.text_config)(**{**config.text_config.to_dict(), **changes})
    text._attn_implementation = "sdpa"
    model = MMARQwen2Model(text, config.plora_rank, config.plora_alpha).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("image_A", "image_B")))
        if name.endswith("image_B"):
            nn.init.normal_(parameter, std=0.02)
    return model


def language_model_loss(
    model: MMARQwen2Model, config: MMARConfig, is_image: Tensor, num_prefix: int = 0
) -> Callable[[], Tensor]:
    """A scalar of the outputs from the picture on; every embedding needs a gradient, as where a picture is put in."""
    batch, length = is_image.shape
    generator = torch.Generator().manual_seed(SEED)  # the same for either way
    embeds = torch.randn(batch, length, config.text_config.hidden_size, generator=generator).requires_grad_()
    block_ids = image_block_ids(is_image, config.num_latents)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same_picture = (block_ids[:, :, None] == block_ids[:, None, :]) & is_image[:, :, None]
    mask = (causal | same_picture)[:, None]  # (B, 1, L, L)
    position_ids = shared_position_ids(is_image, config.num_latents)
    first_image = int(is_image.any(0).int().argmax())

    def loss() -> Tensor:
        embeds.grad = None
        output = model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": mask},
            position_ids=position_ids,
            image_token_mask=is_image,
            num_image_tokens=int(is_image.sum()),
            num_prefix_tokens=num_prefix,
            use_cache=False,
        ).last_hidden_state
        return output[:, first_image:].square().mean()

    return loss


# --------------------------------------------------------------------------------------------------------- comparisons


def labelled_positions(config: MMARConfig) -> Comparison:
    text = config.text_config
    num_labels, length = 40, QUESTION_PREFIX + config.num_latents + 12 + 40
    lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False).requires_grad_(False)
    hidden_states = torch.randn(NUM_ROWS, length, text.hidden_size).requires_grad_()
    labels = torch.full((NUM_ROWS, length), -100)
    labels[:, -num_labels:] = torch.randint(text.vocab_size, (NUM_ROWS, num_labels))

    def plain() -> Tensor:
        logits = lm_head(hidden_states).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def saving() -> Tensor:
        predicts = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
        return F.cross_entropy(lm_head(hidden_states[predicts]).float(), labels[:, 1:][predicts[:, :-1]])

    sizes = f"{NUM_ROWS} x {length} positions, {NUM_ROWS * num_labels} labelled; V {text.vocab_size:,}"
    return Comparison("cross entropy on labelled positions only", sizes, plain, saving, (lm_head,))


def hidden_tokens(config: MMARConfig, num_blocks: int) -> Comparison:
    diffusion = type(config.diffusion_config)(**{**config.diffusion_config.to_dict(), "num_hidden_layers": num_blocks})
    channels, width, num_latents = config.latent_channels, config.text_config.hidden_size, config.num_latents
    head = MMARDiffusionMLP(diffusion, channels, width)
    hidden = torch.arange(num_latents) < round(HIDDEN_SHARE * num_latents)
    tokens, z = torch.randn(num_latents, channels), torch.randn(num_latents, width).requires_grad_()
    alphas_cumprod = cosine_alphas_cumprod(diffusion.num_train_timesteps)
    mul = diffusion.diffusion_batch_mul

    def plain() -> Tensor:
        losses, _ = diffusion_losses(head, tokens, z, alphas_cumprod, diffusion_batch_mul=mul)
        return losses[:, hidden].mean()

    def saving() -> Tensor:
        losses, _ = diffusion_losses(head, tokens[hidden], z[hidden], alphas_cumprod, diffusion_batch_mul=mul)
        return losses.mean()

    sizes = f"1 picture, {int(hidden.sum())} of {num_latents} tokens hidden, {mul} timesteps each; {num_blocks} blocks"
    return Comparison("Diffusion MLP on hidden tokens only", sizes, plain, saving, (head,))


def branch_by_number(config: MMARConfig, num_layers: int) -> list[Comparison]:
    """PLoRA's branch masked in every linear, as in eval mode, against image tokens taken by number."""
    train, plain = language_model(config, num_layers), language_model(config, num_layers).eval()
    plain.load_state_dict(train.state_dict())
    comparisons = []
    for name, before, after in (
        ("a question and its answer", QUESTION_PREFIX, 86),
        ("a caption of 40 tokens", CAPTION_PREFIX + 40, 0),
        ("no text", 0, 0),
    ):
        is_image = rows_of_text(before, after, config.num_latents)
        ways = (language_model_loss(model, config, is_image) for model in (plain, train))
        share = before + after, before + after + config.num_latents
        sizes = f"{name}: {NUM_ROWS} rows, {share[0]} of {share[1]} tokens are text; {num_layers} layer"
        comparisons.append(Comparison("PLoRA's branch on image tokens only", sizes, *ways, (plain, train)))
    return comparisons


def text_prefix(config: MMARConfig, num_layers: int) -> list[Comparison]:
    """Both with the branch on image tokens only."""
    model = language_model(config, num_layers)
    comparisons = []
    for num_tokens in (8, 16, 32, 64, 128):
        is_image = rows_of_text(num_tokens, 0, config.num_latents)
        ways = (language_model_loss(model, config, is_image, num_prefix) for num_prefix in (0, num_tokens))
        share = num_tokens / is_image.shape[1]
        sizes = f"{NUM_ROWS} rows, {num_tokens} of {is_image.shape[1]} columns ({share:.0%}); {num_layers} layer"
        comparisons.append(Comparison("no gradients for the text prefix", sizes, *ways, (model,)))
    checkpointed = language_model(config, num_layers)
    checkpointed.activation_checkpointing_enable()
    is_image = rows_of_text(CAPTION_PREFIX + 40, 0, config.num_latents)
    ways = (language_model_loss(checkpointed, config, is_image, num) for num in (0, CAPTION_PREFIX + 40))
    sizes = f"the same with gradient checkpointing, {CAPTION_PREFIX + 40} of {is_image.shape[1]} columns"
    return [*comparisons, Comparison("no gradients for the text prefix", sizes, *ways, (checkpointed,))]


def both_in_the_language_model(config: MMARConfig, num_layers: int) -> Comparison:
    train, plain = language_model(config, num_layers), language_model(config, num_layers).eval()
    plain.load_state_dict(train.state_dict())
    is_image = rows_of_text(CAPTION_PREFIX + 40, 0, config.num_latents)
    ways = (
        language_model_loss(plain, config, is_image),
        language_model_loss(train, config, is_image, CAPTION_PREFIX + 40),
    )
    sizes = f"a caption of 40 tokens: {NUM_ROWS} rows, {CAPTION_PREFIX + 40} of {is_image.shape[1]} tokens are text"
    return Comparison("both, branch and prefix", sizes, *ways, (plain, train))


# ------------------------------------------------------------------------------------------------------ merged weights


def merged(linear: PLoRALinear, inputs: Tensor) -> Tensor:
    """`PLoRALinear` on image tokens by one product with W + scaling B A."""
    weight = linear.weight + linear.image_scaling * (linear.image_B @ linear.image_A)
    return F.linear(inputs, weight, linear.bias)


def merged_weights(config: MMARConfig) -> list[Comparison]:
    """The linears of one layer on image tokens alone, against one product each with merged weights."""
    layer = language_model(config, 1).layers[0]
    linears = [module for module in layer.modules() if isinstance(module, PLoRALinear)]
    comparisons = []
    for num_pictures in (1, 4, 16):
        num_tokens = num_pictures * config.num_latents
        inputs = {width: torch.randn(num_tokens, width) for width in {linear.in_features for linear in linears}}
        inputs = {width: value.requires_grad_() for width, value in inputs.items()}
        every = torch.arange(num_tokens)

        def plain(inputs=inputs, every=every) -> Tensor:
            return sum(linear(inputs[linear.in_features], every).square().mean() for linear in linears)

        def saving(inputs=inputs) -> Tensor:
            return sum(merged(linear, inputs[linear.in_features]).square().mean() for linear in linears)

        sizes = f"{num_pictures} pictures, {num_tokens} image tokens; the 7 linears of a layer"
        comparisons.append(Comparison("merged PLoRA (not built)", sizes, plain, saving, (layer,)))
    return comparisons


def macs_of_merging(config: MMARConfig) -> dict[str, float]:
    r"""
    Multiply-adds of one layer's linears in training, per image token unless stated.

    Forward and backward of the frozen base are 2 products, of the branch 3, of merged weights 3: the gradient of a
    merged weight is one. Per layer and pass on top of that: B A, and the gradients of A and B from that of W.

    Args:
        config (`MMARConfig`): The model.

    Returns:
        `dict[str, float]`: `branch` and `merged`; `fixed`, per pass; `pictures`, from which merging needs fewer.
    """
    text = config.text_config
    heads = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    shapes = [(text.hidden_size, text.hidden_size)] * 2 + [(text.hidden_size, heads)] * 2
    shapes += [(text.hidden_size, text.intermediate_size)] * 3
    base = sum(a * b for a, b in shapes)
    branch = config.plora_rank * sum(a + b for a, b in shapes)
    fixed = 3 * config.plora_rank * base
    saved = 3 * branch - base
    return {
        "branch": 2 * base + 3 * branch,
        "merged": 3 * base,
        "fixed": fixed,
        "pictures": fixed / saved / config.num_latents,
    }


def branch_errors(config: MMARConfig) -> tuple[float, float]:
    """
    Relative error of the branch's part of an output in bfloat16, beside the base and merged, after one step of AdamW.

    The branch is then much smaller than W, and rounding W + B A to bfloat16 loses most of it.
    """
    width, rank = config.text_config.hidden_size, config.plora_rank
    linear = PLoRALinear(width, width, rank, config.plora_alpha, bias=False)
    nn.init.normal_(linear.weight, std=config.text_config.initializer_range)
    linear.weight.data = linear.weight.data.bfloat16().float()  # as Qwen2 is published
    linear.image_B.data = LEARNING_RATE * torch.randn_like(linear.image_B).sign()
    inputs = torch.randn(config.num_latents, width).bfloat16().float()
    with torch.no_grad():
        expected = F.linear(inputs, linear.image_scaling * linear.image_B @ linear.image_A)
        branch = F.linear(inputs.bfloat16(), linear.image_A.bfloat16()) * linear.image_scaling
        branch = F.linear(branch, linear.image_B.bfloat16()).float()
        weight = linear.weight + linear.image_scaling * (linear.image_B @ linear.image_A)
        # The products in float32: what is looked at is the rounding of the weight.
        of_merged = F.linear(inputs, weight.bfloat16().float()) - F.linear(inputs, linear.weight)
    return tuple(float((got - expected).norm() / expected.norm()) for got in (branch, of_merged))


# ------------------------------------------------------------------------------------------------------------- latents


@dataclass
class PictureTimes:
    """CPU seconds per picture: encoding, reading, and the parts of a training step, each per layer."""

    encode: float
    read: float
    llm_layer: float
    vit_layer: float
    head_block: float

    def step(self, config: MMARConfig) -> float:
        """A step with all layers; what is not in layers is left out."""
        return (
            config.text_config.num_hidden_layers * self.llm_layer
            + config.vit_config.num_hidden_layers * self.vit_layer
            + config.diffusion_config.num_hidden_layers * self.head_block
        )


def picture_times(config: MMARConfig, num_runs: int) -> PictureTimes:
    r"""
    Encoding a picture, and reading its latents, against the step that is made of it: text to image, 40 tokens of
    caption.

    The step's layers are timed by taking a part with one layer from the same with two.

    Args:
        config (`MMARConfig`): MMAR-0.5B.
        num_runs (`int`): How often each is run.

    Returns:
        `PictureTimes`
    """
    vae = MMARAutoencoderKL(**config.vae_config).eval()
    pixel_values = torch.rand(1, 3, config.image_size, config.image_size) * 2 - 1
    num_rows, size = 64, config.latent_size
    is_image = rows_of_text(CAPTION_PREFIX + 40, 0, config.num_latents, num_rows=1)
    hidden = torch.arange(config.num_latents)[None] < round(HIDDEN_SHARE * config.num_latents)
    tokens = torch.randn(1, config.num_latents, config.latent_channels)

    def encode() -> None:
        with torch.no_grad():
            vae.encode(pixel_values).latent_dist.mean.float()

    def language_model_step(num_layers: int) -> Callable[[], None]:
        loss = language_model_loss(language_model(config, num_layers), config, is_image, CAPTION_PREFIX + 40)
        return lambda: loss().backward()

    def vit_step(num_layers: int) -> Callable[[], None]:
        vit = type(config.vit_config)(**{**config.vit_config.to_dict(), "num_hidden_layers": num_layers})
        encoder = MMARLatentEncoder(_with(config, vit_config=vit))
        return lambda: encoder(tokens, hidden).square().mean().backward()

    def head_step(num_blocks: int) -> Callable[[], None]:
        loss = hidden_tokens(config, num_blocks).saving
        return lambda: loss().backward()

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/latents.safetensors"
        save_file({"picture": torch.randn(num_rows, 1, 2, config.latent_channels, size, size).half()}, file)
        with safe_open(file, framework="pt") as opened:
            stored = opened.get_slice("picture")
            row = iter(range(num_rows * (num_runs + 1)))

            def read() -> None:
                mean, std = stored[next(row) % num_rows][0].float()
                mean + std * torch.randn(mean.shape)

            runs = [encode, read]
            runs += [step(num) for step in (language_model_step, vit_step, head_step) for num in (1, 2)]
            encode_time, read_time, *steps = medians(runs, num_runs)
    layers = [two - one for one, two in zip(steps[::2], steps[1::2], strict=True)]
    return PictureTimes(encode_time, read_time, *layers)


def _with(config: MMARConfig, **changes) -> MMARConfig:
    return MMARConfig(**{**{name: getattr(config, name) for name in ("text_config", "vae_config")}, **changes})


# -------------------------------------------------------------------------------------------------------------- report


def table(results: list[Result]) -> str:
    lines = [
        "| saving | sizes | plain, s | so, s | plain / so | kept for backward: plain, MB | so, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        (plain, saving), (plain_kept, saving_kept) = result.seconds, result.kept
        lines.append(
            f"| {result.name} | {result.sizes} | {plain:.2f} | {saving:.2f} | {plain / saving:.2f} | "
            f"{plain_kept / MEGA:.0f} | {saving_kept / MEGA:.0f} |"
        )
    return "\n".join(lines)


def report(results: list[Result], times: PictureTimes, num_runs: int) -> str:
    """The results as a page of docs/results."""
    small, large = load_preset("mmar-0.5b"), load_preset("mmar-7b")
    step = times.step(small)
    errors = branch_errors(small)
    merging = "\n".join(
        f"| {name} | {m['branch'] / MEGA:.1f} M | {m['merged'] / MEGA:.1f} M | {m['fixed'] / GIGA:.1f} G | "
        f"{m['pictures']:.1f} |"
        for name, m in (("0.5B", macs_of_merging(small)), ("7B", macs_of_merging(large)))
    )
    return f"""# Training: what is left out, and what that saves

{date.today().isoformat()}, commit {commit()}, {processor()}, one thread, float32; {versions()}.
Written by `python -m mmar.benchmarks.training_savings`: widths of MMAR-0.5B
(PLoRA r 512) with random weights, CPU time of forward and backward pass, medians of {num_runs} runs in turn. Not
measured on a GPU. "Kept for backward" leaves out weights; with gradient checkpointing it is what lies between layers.

{table(results)}

A prefix of less than {MIN_PREFIX_SHARE:.2%} of the columns (`MIN_PREFIX_SHARE`) is left as it is.

## Cached latents

Per picture, with {CAPTION_PREFIX + 40} tokens of text before it; a step with all layers is the sum of so many times
one layer, measured with two layers and with one.

| part | CPU time per picture |
| --- | ---: |
| VAE encode, KL-16 at 256 x 256 | {times.encode:.2f} s |
| reading its latents and sampling | {1e3 * times.read:.2f} ms |
| language model, 24 layers of {times.llm_layer:.3f} s | {24 * times.llm_layer:.2f} s |
| EmbeddingViT, 16 layers of {1e3 * times.vit_layer:.0f} ms | {16 * times.vit_layer:.2f} s |
| Diffusion MLP, 8 blocks of {1e3 * times.head_block:.0f} ms | {8 * times.head_block:.2f} s |
| the step without encoding | {step:.2f} s |

Encoding is {times.encode / (step + times.encode):.0%} of a step that encodes; with cached latents a step is
{(step + times.encode) / step:.2f} times as fast.

## Merged PLoRA in training

x (W + s B A)^T is one product per linear instead of three, but training then needs the gradient of the merged weight.
Multiply-adds of a layer's linears, forward and backward:

| model | branch, per image token | merged, per image token | merged, on top per pass | pays above, pictures |
| --- | ---: | ---: | ---: | ---: |
{merging}

So it saves work only from that many pictures on a device in one pass. It is not built, because it is not exact where
it matters: the paper trains in bfloat16, and W + s B A rounded to bfloat16 loses the branch while it is small. After
one step of AdamW, when every number of B is {LEARNING_RATE} or its negative, the branch's part of the output has a
relative error of {errors[0]:.2%} computed beside the base, and of {errors[1]:.0%} merged. The merged weights of all
layers are also kept from the forward to the backward pass, as much memory as the backbone takes, and a quantized
backbone has no W to add to. It is for generation, where all running tokens are of images and nothing is trained.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_runs", type=int, default=7, help="how often each is run")
    parser.add_argument("--out", type=Path, help="folder to write the page to, as <date>_training_savings.md")
    arguments = parser.parse_args()
    if arguments.num_runs < 1:
        raise ValueError(f"`num_runs` must be at least 1; got {arguments.num_runs}.")
    if arguments.out is not None:
        check_folder(arguments.out)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    config = load_preset("mmar-0.5b")
    makers = [
        lambda: [labelled_positions(config)],
        lambda: [hidden_tokens(config, num_blocks=2)],
        lambda: branch_by_number(config, num_layers=1),
        lambda: text_prefix(config, num_layers=1),
        lambda: [both_in_the_language_model(config, num_layers=1)],
        lambda: merged_weights(config),
    ]
    results = []
    for make in makers:
        for comparison in make():
            results.append(compare(comparison, arguments.num_runs))
            print(table(results).splitlines()[-1], flush=True)
    page = report(results, picture_times(config, arguments.num_runs), arguments.num_runs)
    print(page)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{date.today().isoformat()}_training_savings.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
