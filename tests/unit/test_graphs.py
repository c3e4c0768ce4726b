"""What becomes a CUDA graph: the bookkeeping, with a graph that records on any device; the real one on a GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import random_text, seeded, tiny_model

from mmar.modeling_mmar import graphs_mmar
from mmar.modeling_mmar.denoising_mmar import Denoiser
from mmar.modeling_mmar.generation_mmar import RoundEncoder
from mmar.modeling_mmar.graphs_mmar import CALLS_BEFORE_CAPTURE, GraphCache, has_hooks
from mmar.modeling_mmar.packed_linear_mmar import PackedLinear


class Recorder:
    """Captures as a CUDA graph does: replaying reads the captured arguments and writes the captured result."""

    def __init__(self):
        self.num_captures = self.num_replays = 0

    def __call__(self, function, arguments):
        self.num_captures += 1
        output = function(*arguments)

        def replay():
            self.num_replays += 1
            output.copy_(function(*arguments))

        return replay, output


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(GraphCache, "is_capturable", staticmethod(lambda tensor: True))
    return Recorder()


def power(exponent, a):
    return a**exponent


def test_captured_once_it_was_called_often_with_the_same_shapes(recorder):
    graphs, results = GraphCache(recorder), []
    for number in range(CALLS_BEFORE_CAPTURE + 3):
        a, b = torch.full((2, 3), float(number)), torch.ones(3)
        results.append(graphs.run(lambda exponent, a, b: a**exponent + b, 2, a, b))
    # No result is the place that the next call writes to.
    for number, result in enumerate(results):
        assert torch.equal(result, torch.full((2, 3), number**2 + 1.0))
    assert (recorder.num_captures, recorder.num_replays) == (1, 3)


def test_other_shapes_dtypes_and_static_arguments_have_graphs_of_their_own(recorder):
    graphs = GraphCache(recorder)
    arguments = [(2, torch.ones(2)), (3, torch.ones(2)), (2, torch.ones(4)), (2, torch.ones(2).double())]
    for _ in range(CALLS_BEFORE_CAPTURE + 2):
        for exponent, tensor in arguments:
            assert torch.equal(graphs.run(power, exponent, tensor * 2), (tensor * 2) ** exponent)
    assert (recorder.num_captures, recorder.num_replays) == (4, 8)


def test_a_capture_that_fails_is_not_tried_again(recorder):
    calls = []

    def fail(*_):
        calls.append(1)
        raise RuntimeError("out of memory")

    graphs = GraphCache(fail)
    for _ in range(CALLS_BEFORE_CAPTURE + 5):
        assert torch.equal(graphs.run(power, 2, torch.full((2,), 3.0)), torch.full((2,), 9.0))
    assert calls == [1]


def test_on_a_cpu_every_call_runs_as_it_is():
    def fail(*_):
        raise AssertionError

    graphs = GraphCache(fail)
    for _ in range(CALLS_BEFORE_CAPTURE + 2):
        assert torch.equal(graphs.run(power, 2, torch.ones(2)), torch.ones(2))


def draw(model, **arguments):
    return model.generate_images(
        random_text(2, 6),
        negative_input_ids=random_text(2, 3),
        generator=[seeded(0), seeded(1)],
        num_ar_steps=8,
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="latent",
        **arguments,
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"guidance_schedule": "linear"}, {"guidance_interval": (0.0, 0.5)}], ids=str
)
def test_pictures_by_graphs_are_the_same(recorder, monkeypatch, arguments):
    model = tiny_model()
    monkeypatch.setattr(GraphCache.__init__, "__defaults__", (recorder,))
    monkeypatch.setattr(graphs_mmar, "CALLS_BEFORE_CAPTURE", 1)
    captured = draw(model, **arguments)
    # Eight rounds of 1, 2 or 3 tokens: some shapes come again, in the language model and in the sampler.
    assert recorder.num_captures >= 2 and recorder.num_replays >= 4
    monkeypatch.undo()
    # Sums of EmbeddingViT with padding go in another order, and guidance and rounds enlarge that.
    torch.testing.assert_close(captured, draw(model, **arguments), atol=1e-4, rtol=1e-4)


def test_the_encoder_of_known_tokens_has_few_shapes(recorder, monkeypatch):
    model, static = tiny_model(), []
    encoder, plain = RoundEncoder(model.model.latent_encoder), model.model.latent_encoder
    monkeypatch.setattr(encoder, "_graphs", GraphCache(recorder))
    run = encoder._graphs.run
    monkeypatch.setattr(encoder._graphs, "run", lambda function, *rest: static.append(rest[0]) or run(function, *rest))
    tokens = torch.randn(2, 16, 4, generator=seeded(0))
    orders = torch.stack([torch.randperm(16, generator=seeded(seed)) for seed in (1, 2)])
    with torch.no_grad():
        for num_known in range(17):
            hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, orders[:, :num_known], False)
            # What stands at hidden places is read by no slot, a padding one neither.
            masked = tokens.masked_fill(hidden[..., None], float("nan"))
            encoded = encoder(masked, hidden, num_known)
            torch.testing.assert_close(encoded, plain(tokens, hidden, num_known), atol=1e-5, rtol=1e-5)
    assert static == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14, 16, 16]


def test_weights_that_another_thread_has_packed_are_no_hooks():
    module = torch.nn.Linear(3, 3)
    assert not has_hooks(module)
    module.forward = PackedLinear(module.weight, module.bias, num_rows=2)
    assert not has_hooks(module)
    module.forward = lambda inputs: inputs
    assert has_hooks(module)


def test_an_encoder_with_hooks_is_called_as_it_is(recorder, monkeypatch):
    model, calls = tiny_model(), []
    encoder = model.model.latent_encoder
    handle = encoder.embedding_vit.register_forward_hook(lambda *_: calls.append(1))
    tokens, hidden = torch.zeros(1, 16, 4), torch.arange(16)[None] >= 4
    rounds = RoundEncoder(encoder)
    monkeypatch.setattr(rounds, "_graphs", GraphCache(recorder))
    for _ in range(CALLS_BEFORE_CAPTURE + 3):
        rounds(tokens, hidden, 4)
    handle.remove()
    assert len(calls) == CALLS_BEFORE_CAPTURE + 3 and recorder.num_captures == 0


def on_gpu(model):
    device = model.device
    return model.generate_images(
        random_text(2, 6).to(device),
        negative_input_ids=random_text(2, 3).to(device),
        generator=[seeded(0), seeded(1)],
        num_ar_steps=16,
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="latent",
    ).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [0, 1], ids=["first GPU", "second GPU"])
def test_pictures_by_cuda_graphs_are_the_same(monkeypatch, index, dtype):
    if index >= torch.cuda.device_count():
        pytest.skip("one GPU")
    model = tiny_model().to(f"cuda:{index}", dtype)
    monkeypatch.setattr(graphs_mmar, "CALLS_BEFORE_CAPTURE", 2)
    captured = on_gpu(model)
    monkeypatch.setattr(GraphCache, "is_capturable", staticmethod(lambda tensor: False))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(captured, on_gpu(model), atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
def test_threads_draw_with_graphs_of_their_own(monkeypatch):
    monkeypatch.setattr(graphs_mmar, "CALLS_BEFORE_CAPTURE", 1)
    models = [tiny_model(seed).to("cuda") for seed in range(3)]
    expected = [on_gpu(model) for model in models]
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(on_gpu, models))
    for own, other in zip(drawn, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_a_picture_gives_its_memory_back(monkeypatch):
    monkeypatch.setattr(graphs_mmar, "CALLS_BEFORE_CAPTURE", 1)
    model = tiny_model().to("cuda")
    on_gpu(model)
    before = torch.cuda.memory_allocated()
    on_gpu(model)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_the_denoise_loop_never_waits_for_the_gpu():
    model = tiny_model().to("cuda")
    denoiser = Denoiser(model.diffusion_mlp, model.default_scheduler(), 5, torch.device("cuda"))
    z = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        denoiser(z, [2.0] * 5, [seeded(0)])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                denoiser(z, [2.0] * 5, [seeded(0)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
