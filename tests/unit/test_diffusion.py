"""The head against diffusers' schedule and embedding, its layers and its loss by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from helpers import seeded, tiny_model
from torch.nn import functional as F

from mmar.modeling_mmar.diffusion_mmar import cosine_alphas_cumprod, diffusion_loss


@pytest.fixture(scope="module")
def head():
    return tiny_model().diffusion_mlp


@pytest.mark.parametrize("steps", [1000, 50])
def test_schedule_equals_diffusers(steps):
    ours = cosine_alphas_cumprod(steps)
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert ours.dtype == torch.float32 and ours.shape == (steps,)
    # diffusers multiplies a thousand factors in float32, we in float64: at most 1000 roundings of 2^-24.
    torch.testing.assert_close(ours, theirs, rtol=1000 * 2**-24, atol=0)
    assert (ours.diff() < 0).all() and 0 < ours[-1] < ours[0] < 1


def test_timestep_embedding_equals_diffusers(head):
    timesteps = torch.tensor([0, 1, 250, 999])
    embedding = head.timestep_embedding
    sinusoids = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    expected = embedding.linear_2(F.silu(embedding.linear_1(sinusoids)))
    # Angles up to 999 in float32 are exact to 6e-5; the weights make that smaller.
    torch.testing.assert_close(embedding(timesteps), expected, atol=1e-5, rtol=0)


def test_forward_by_hand(head):
    """Suppl. Fig. 6: AdaLN from t and z, two-layer MLP, gated residual; modulated output layer."""
    x, z, timesteps = torch.randn(3, 4), torch.randn(3, 64), torch.tensor([5, 500, 999])
    condition = F.silu(head.timestep_embedding(timesteps) + head.condition_projection(z))

    def normalized(hidden):
        return (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    hidden = head.input_projection(x)
    for block in head.blocks:
        shift, scale, gate = block.modulation(condition).split(32, dim=-1)
        update = (normalized(hidden) * block.norm.weight + block.norm.bias) * (1 + scale) + shift
        update = block.linear_1(update)
        hidden = hidden + gate * block.linear_2(update * torch.sigmoid(update))
    shift, scale = head.final_modulation(condition).split(32, dim=-1)
    expected = head.output_projection(normalized(hidden) * (1 + scale) + shift)
    # Outputs near 1, tens of float32 roundings.
    torch.testing.assert_close(head(x, timesteps, z), expected, atol=1e-5, rtol=0)


def test_prediction_depends_on_every_input_and_on_its_own_row_only(head):
    x, z, timesteps = torch.randn(3, 4), torch.randn(3, 64), torch.tensor([5, 500, 999])
    base = head(x, timesteps, z)
    for changed in (
        head(x + torch.tensor([[1.0], [0], [0]]), timesteps, z),
        head(x, torch.tensor([900, 500, 999]), z),
        head(x, timesteps, z + torch.tensor([[1.0], [0], [0]])),
    ):
        assert (changed[0] - base[0]).abs().max() > 1e-3
        assert torch.equal(changed[1:], base[1:])


def test_fresh_head_predicts_zero():
    from mmar.modeling_mmar.modeling_mmar import MMARForConditionalGeneration

    head = MMARForConditionalGeneration(tiny_model().config).diffusion_mlp
    assert not head(torch.randn(3, 4), torch.tensor([5, 500, 999]), torch.randn(3, 64)).any()


def test_output_is_float32_in_bfloat16():
    head = tiny_model().to(torch.bfloat16).diffusion_mlp
    assert head.input_projection.weight.dtype == torch.bfloat16
    assert head(torch.randn(2, 4), torch.tensor([1, 2]), torch.randn(2, 64)).dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_loss_by_hand(head, prediction_type):
    tokens, z, alphas = torch.randn(5, 4), torch.randn(5, 64), cosine_alphas_cumprod(1000)
    loss = diffusion_loss(head, tokens, z, alphas, prediction_type, diffusion_batch_mul=3, generator=seeded(7))
    generator = seeded(7)
    timesteps = torch.randint(0, 1000, (15,), generator=generator)
    noise = torch.randn(15, 4, generator=generator)
    total = 0.0
    for row in range(15):
        cos, sin = alphas[timesteps[row]].sqrt(), (1 - alphas[timesteps[row]]).sqrt()
        x, epsilon = tokens[row % 5], noise[row]
        target = cos * epsilon - sin * x if prediction_type == "v_prediction" else epsilon
        prediction = head((cos * x + sin * epsilon)[None], timesteps[row : row + 1], z[row % 5][None])[0]
        total += (prediction - target).square().sum()
    # A mean of 60 squares near 1 in another order.
    torch.testing.assert_close(loss, total / 60, rtol=1e-5, atol=0)
    assert loss.dtype == torch.float32


def test_loss_without_generator_follows_the_global_seed(head):
    arguments = (head, torch.randn(5, 4), torch.randn(5, 64), cosine_alphas_cumprod(1000))
    torch.manual_seed(1)
    first = diffusion_loss(*arguments)
    second = diffusion_loss(*arguments)
    torch.manual_seed(1)
    assert torch.equal(first, diffusion_loss(*arguments)) and not torch.equal(first, second)


def test_loss_of_the_exact_predictor_is_zero():
    """A head that knows x predicts v without error: the noise and target use the same alpha-bar."""
    tokens, alphas = torch.randn(6, 4), cosine_alphas_cumprod(1000)

    def oracle(noisy, timesteps, z):
        cos, sin = alphas[timesteps].sqrt()[:, None], (1 - alphas[timesteps]).sqrt()[:, None]
        epsilon = (noisy - cos * z) / sin
        return cos * epsilon - sin * z

    loss = diffusion_loss(oracle, tokens, tokens, alphas, diffusion_batch_mul=8, generator=seeded(0))
    # Dividing by sin(phi) >= 0.006 magnifies roundings of 6e-8 to 1e-5; squared, 1e-10.
    assert loss < 1e-9
