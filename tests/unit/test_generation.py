"""Text with every cache, beams, sampling and streams; pictures with generators, schedulers and known tokens."""

import copy
import dataclasses
from threading import Thread

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from helpers import IMAGE, image_marks, qwen2_of, random_latents, random_text, seeded, tiny_model
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, TextIteratorStreamer, TextStreamer
from transformers.cache_utils import DynamicCache, StaticCache

from mmar.modeling_mmar.fast_generation_mmar import CachedDiffusionHead, FusedPLoRAContext
from mmar.modeling_mmar.generation_mmar import PRESETS, GenerationState
from mmar.modeling_mmar.masking_mmar import shared_position_ids, tokens_per_step


# Float32 sums in another order: logits near 5 through three layers, about a hundred roundings of 2^-24.
ATOL = 5e-5
# Latents near 3 of three rounds that feed each other, with guidance: 1e-5 to 3e-5, by processor and number of threads.
ROUNDS_ATOL = 1e-4
NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def prompt(model):
    """Text, a picture, text."""
    text = random_text(2, 9)
    return {
        "input_ids": torch.cat([text[:, :4], image_marks(model, 2), text[:, 4:]], 1),
        "latents": random_latents(model, 2),
    }


@pytest.fixture(scope="module")
def mixed(model):
    """Rows with one picture, none, and two; left padded to one length. Also each row alone."""
    text, marks = random_text(3, 20, seed=4), image_marks(model, 1)[0]
    rows = [
        torch.cat([text[0, :4], marks, text[0, 4:9]]),
        text[1, :11],
        torch.cat([marks, text[2, :3], marks, text[2, 3:6]]),
    ]
    length, latents = max(len(row) for row in rows), random_latents(model, 3)
    padding = [length - len(row) for row in rows]
    batch = {
        "input_ids": torch.stack(
            [torch.cat([torch.full((n,), 9), row]) for n, row in zip(padding, rows, strict=True)]
        ),
        "attention_mask": torch.stack([(torch.arange(length) >= n).long() for n in padding]),
        "latents": latents,
    }
    pictures = (latents[:1], None, latents[1:])
    alone = [{"input_ids": row[None], "latents": own} for row, own in zip(rows, pictures, strict=True)]
    return batch, alone


def new_tokens(model, prompt, **settings):
    return model.generate(**prompt, **settings)[:, prompt["input_ids"].shape[1] :]


def greedy_by_hand(model, prompt, steps=NEW):
    """The whole sequence again for every token: no cache, no `generate`."""
    ids = prompt["input_ids"]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, latents=prompt["latents"]).logits[:, -1].clone()
        logits[:, IMAGE] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, prompt["input_ids"].shape[1] :]


# ----------------------------------------------------------------------------------------------------------- text


def test_every_cache_gives_the_same_text(model, prompt):
    expected = greedy_by_hand(model, prompt)
    assert len(set(expected.flatten().tolist())) > 2
    assert torch.equal(new_tokens(model, prompt, **GREEDY), expected)
    assert torch.equal(new_tokens(model, prompt, use_cache=False, **GREEDY), expected)
    assert torch.equal(new_tokens(model, prompt, cache_implementation="static", **GREEDY), expected)
    cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(new_tokens(model, prompt, past_key_values=cache, **GREEDY), expected)
    cache = StaticCache(config=model.config.text_config, max_cache_len=40)
    assert torch.equal(new_tokens(model, prompt, past_key_values=cache, **GREEDY), expected)


def test_every_cache_gives_the_same_logits(model, prompt):
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    reference = torch.stack(model.generate(**prompt, use_cache=False, **settings).logits)
    for cache in ({}, {"cache_implementation": "static"}):
        logits = torch.stack(model.generate(**prompt, **cache, **settings).logits)
        torch.testing.assert_close(logits, reference, atol=ATOL, rtol=0)


class CountOfSyncs(TorchDispatchMode):
    """How many operations are called, and how many of them wait for a device."""

    def __init__(self):
        super().__init__()
        self.counts = {"all": 0, "syncs": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts["all"] += 1
        self.counts["syncs"] += any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "equal"))
        return function(*args, **(kwargs or {}))


def counts_per_token(model, prompt, **settings):
    counts = []
    for number in (4, 12):
        with CountOfSyncs() as mode:
            model.generate(**prompt, max_new_tokens=number, do_sample=False, **settings)
        counts.append(mode.counts)
    return {name: (counts[1][name] - counts[0][name]) / 8 for name in counts[0]}


# A static cache that is not compiled counts its tokens on the device, and positions are looked up by that number.
@pytest.mark.parametrize(("settings", "more_syncs"), [({}, 0), ({"cache_implementation": "static"}, 1)], ids=str)
def test_a_decoding_step_does_little_more_than_qwen2s(model, settings, more_syncs):
    prompt = {"input_ids": random_text(1, 9)}
    expected = counts_per_token(qwen2_of(model), prompt, **settings)
    got = counts_per_token(model, prompt, **settings)
    assert got["syncs"] <= expected["syncs"] + more_syncs
    # The image token is suppressed (4), positions are kept (3), and a static cache is asked for their number (1).
    assert got["all"] <= expected["all"] + 8


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_batch_of_different_lengths(model, mixed, settings):
    batch, alone = mixed
    output = new_tokens(model, batch, **settings, **GREEDY)
    expected = torch.cat([new_tokens(model, row, **GREEDY) for row in alone])
    assert torch.equal(output, expected)
    assert torch.equal(expected, torch.cat([greedy_by_hand(model, row) for row in alone]))


def test_decoding_compiles_into_one_graph(mixed):
    """With a static cache, as transformers does by itself on a GPU: no graph break, nothing compiled twice."""
    model = tiny_model()
    settings = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    settings._compile_all_devices = True
    expected = model.generate(**mixed[0], **GREEDY)
    torch.compiler.reset()
    counters.clear()
    compiled = model.generate(**mixed[0], **GREEDY, cache_implementation="static", compile_config=settings)
    assert torch.equal(compiled, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["latents", "pixel_values"])
def test_an_assistant_reads_the_pictures_too(model, prompt, name):
    prompt = {"input_ids": prompt["input_ids"][:1], "latents": prompt["latents"][:1]}
    if name == "pixel_values":
        pictures = torch.rand(1, 3, 8, 8, generator=seeded(5)) * 2 - 1
        prompt = {"input_ids": prompt["input_ids"], name: pictures}
    expected = new_tokens(model, prompt, **GREEDY)
    for assistant in (model, tiny_model(seed=1)):
        assert torch.equal(new_tokens(model, prompt, assistant_model=assistant, **GREEDY), expected)


def test_beams_with_pictures(model, mixed):
    batch, alone = mixed
    settings = {"num_beams": 3, **GREEDY}
    output = new_tokens(model, batch, **settings)
    assert torch.equal(output, torch.cat([new_tokens(model, row, **settings) for row in alone]))
    # Several beams of each row, best first.
    several = new_tokens(model, batch, num_return_sequences=2, **settings)
    assert torch.equal(several[::2], output) and not torch.equal(several[1::2], output)
    # A beam of one and the whole sequence each step agree with the cached greedy text.
    uncached = new_tokens(model, batch, use_cache=False, **settings)
    assert torch.equal(uncached, output)


def test_beams_with_the_wrong_number_of_pictures(model, mixed):
    batch = {**mixed[0], "latents": mixed[0]["latents"][:2]}
    with pytest.raises(ValueError, match="expected one picture in `latents` for each 16 image tokens.*, 3; got 2"):
        model.generate(**batch, num_beams=2, **GREEDY)


def test_sampling_and_return_sequences(model, mixed):
    settings = {"max_new_tokens": NEW, "do_sample": True, "top_k": 20}
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(new_tokens(model, mixed[0], num_return_sequences=2, **settings))
    assert outputs[0].shape == (6, NEW) and torch.equal(*outputs)
    assert not torch.equal(outputs[0][::2], outputs[0][1::2])
    # Each copy of a row keeps its own pictures: as good as the row given twice.
    batch, alone = mixed
    doubled = {
        "input_ids": alone[2]["input_ids"].repeat(2, 1),
        "latents": alone[2]["latents"].repeat(2, 1, 1, 1),
    }
    torch.manual_seed(5)
    twice = new_tokens(model, doubled, **settings)
    torch.manual_seed(5)
    assert torch.equal(new_tokens(model, alone[2], num_return_sequences=2, **settings), twice)


def test_pictures_change_the_text(model, prompt):
    other = {**prompt, "latents": prompt["latents"] + 1.0}
    with torch.no_grad():
        difference = model(**other).logits[:, -1] - model(**prompt).logits[:, -1]
    assert difference.abs().amax(-1).min() > 1e-3


def test_pixel_values_in_generate(model, prompt):
    pixel_values = torch.rand(2, 3, 8, 8, generator=seeded(5)) * 2 - 1
    latents = model.encode_images(pixel_values)
    expected = new_tokens(model, {**prompt, "latents": latents}, **GREEDY)
    given = {"input_ids": prompt["input_ids"], "pixel_values": pixel_values}
    for settings in ({}, {"use_cache": False}, {"num_beams": 1}):
        assert torch.equal(new_tokens(model, given, **settings, **GREEDY), expected)


def test_the_image_token_is_never_written():
    model = tiny_model(text_config={"tie_word_embeddings": False})
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = model.lm_head.weight[5] * 100
    ids = random_text(4, 6)
    with torch.no_grad():
        assert (model(ids).logits[:, -1].argmax(-1) == IMAGE).any()
    for settings in ({}, {"suppress_tokens": [5]}, {"use_cache": False}):
        output = new_tokens(model, {"input_ids": ids}, **settings, **GREEDY)
        assert not (output == IMAGE).any()
        assert "suppress_tokens" not in settings or not (output == 5).any()


class Words:
    """A tokenizer for streams: one word per id."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(item)} " for item in ids)


def test_streaming(model, prompt, capsys):
    one = {name: value[:1] for name, value in prompt.items()}
    expected = Words().decode(new_tokens(model, one, **GREEDY)[0])
    model.generate(**one, streamer=TextStreamer(Words(), skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.strip() == expected.strip()
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**one, "streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 1


# ---------------------------------------------------------------------------------------------------- caches by hand


def run_pieces(model, pieces, pictures, cache=None, attention_mask=None, **kwargs):
    """Logits of a sequence given piece by piece, no position told."""
    logits, start = [], 0
    for piece, latents in zip(pieces, pictures, strict=True):
        start += piece.shape[1]
        mask = None if attention_mask is None else attention_mask[:, :start]
        with torch.no_grad():
            output = model(
                piece, latents=latents, past_key_values=cache, attention_mask=mask, use_cache=True, **kwargs
            )
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("kind", ["none given", "dynamic", "static"])
def test_turns_by_hand_equal_one_pass(model, kind):
    """A picture in the past: the next token's position is not the number of tokens."""
    text, marks, latents = random_text(2, 30), image_marks(model, 2), random_latents(model, 4)
    first, second = latents[[0, 2]], latents[[1, 3]]
    pieces = [torch.cat([text[:, :4], marks, text[:, 4:6]], 1), text[:, 6:7], text[:, 7:11]]
    pieces += [torch.cat([text[:, 11:13], marks], 1), text[:, 13:18]]
    cache = {
        "none given": None,
        "dynamic": DynamicCache(config=model.config.text_config),
        "static": StaticCache(config=model.config.text_config, max_cache_len=64),
    }[kind]
    logits, _ = run_pieces(model, pieces, [first, None, None, second, None], cache)
    with torch.no_grad():
        expected = model(torch.cat(pieces, 1), latents=latents).logits
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


def test_turns_by_hand_with_left_padding(model):
    text, marks, latents = random_text(2, 20), image_marks(model, 2), random_latents(model, 2)
    pieces = [torch.cat([text[:, :6], marks, text[:, 6:8]], 1), text[:, 8:12]]
    attention_mask = torch.ones(2, 28, dtype=torch.long)
    attention_mask[0, :5] = 0
    logits, _ = run_pieces(model, pieces, [latents, None], attention_mask=attention_mask)
    with torch.no_grad():
        expected = model(torch.cat(pieces, 1), latents=latents, attention_mask=attention_mask).logits
    visible = attention_mask.bool()
    torch.testing.assert_close(logits[visible], expected[visible], atol=ATOL, rtol=0)


def test_crop_of_an_image_block(model):
    """After `crop` the positions count on from what is left; the picture is drawn anew, or text takes its place."""
    text, marks, latents = random_text(1, 20), image_marks(model, 1), random_latents(model, 2)
    _, cache = run_pieces(model, [text[:, :5], torch.cat([marks, text[:, 5:8]], 1)], [None, latents[:1]])
    cache.crop(-3)
    after, _ = run_pieces(model, [text[:, 8:12]], [None], copy.deepcopy(cache))
    with torch.no_grad():
        expected = model(torch.cat([text[:, :5], marks, text[:, 8:12]], 1), latents=latents[:1]).logits[:, -4:]
    torch.testing.assert_close(after, expected, atol=ATOL, rtol=0)
    cache.crop(-16)
    assert cache.get_seq_length() == 5
    again, cropped = run_pieces(model, [torch.cat([marks, text[:, 8:12]], 1)], [latents[1:]], copy.deepcopy(cache))
    with torch.no_grad():
        expected = model(torch.cat([text[:, :5], marks, text[:, 8:12]], 1), latents=latents[1:]).logits[:, 5:]
        plain = model(torch.cat([text[:, :5], text[:, 8:12]], 1)).logits[:, 5:]
    torch.testing.assert_close(again, expected, atol=ATOL, rtol=0)
    without, _ = run_pieces(model, [text[:, 8:12]], [None], cache)
    torch.testing.assert_close(without, plain, atol=ATOL, rtol=0)
    with pytest.raises(ValueError, match="negative"):
        cropped.crop(5)


def test_generate_continues_a_cache_across_turns(model, prompt):
    """Full ids, or only the new ones with the full mask; the picture lies in the past."""
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**prompt, past_key_values=cache, **GREEDY)
    turn = torch.cat([first, random_text(2, 6, seed=8)], 1)
    expected = greedy_by_hand(model, {**prompt, "input_ids": turn})
    mask = torch.ones_like(turn)
    past = cache.get_seq_length()
    full = model.generate(turn, attention_mask=mask, past_key_values=copy.deepcopy(cache), **GREEDY)
    assert torch.equal(full[:, -NEW:], expected)
    full = model.generate(turn, past_key_values=copy.deepcopy(cache), **GREEDY)
    assert torch.equal(full[:, -NEW:], expected)
    new = model.generate(turn[:, past:], attention_mask=mask, past_key_values=copy.deepcopy(cache), **GREEDY)
    assert torch.equal(new[:, -NEW:], expected)
    # By hand after `generate`, without positions.
    logits, _ = run_pieces(model, [turn[:, past:]], [None], copy.deepcopy(cache))
    with torch.no_grad():
        whole = model(turn, latents=prompt["latents"]).logits[:, past:]
    torch.testing.assert_close(logits, whole, atol=ATOL, rtol=0)


def test_a_second_picture_in_a_later_turn(model, prompt):
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**prompt, past_key_values=cache, **GREEDY)
    turn = torch.cat([first, random_text(2, 2, seed=8), image_marks(model, 2), random_text(2, 3, seed=9)], 1)
    latents = random_latents(model, 2, seed=6)
    both = torch.stack([prompt["latents"], latents], 1).flatten(0, 1)
    expected = greedy_by_hand(model, {"input_ids": turn, "latents": both})
    output = model.generate(turn, latents=latents, past_key_values=cache, **GREEDY)
    assert torch.equal(output[:, -NEW:], expected)


def test_generate_continues_a_left_padded_cache(model, mixed):
    batch, alone = mixed
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**batch, past_key_values=cache, **GREEDY)
    more = random_text(3, 4, seed=8)
    turn = torch.cat([first, more], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, NEW + 4, dtype=torch.long)], 1)
    past = cache.get_seq_length()
    expected = []
    for row, own in enumerate(alone):
        ids = torch.cat([own["input_ids"], turn[row : row + 1, -(NEW + 4) :]], 1)
        expected.append(greedy_by_hand(model, {**own, "input_ids": ids}))
    expected = torch.cat(expected)
    for ids in (turn, turn[:, past:]):
        output = model.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(output[:, -NEW:], expected)


@pytest.fixture(scope="module")
def chat(model):
    """Left padded rows with one image, none and two; then a second turn, with an image, none and one."""
    text, marks = random_text(3, 60, seed=4), image_marks(model, 1)[0]
    rows = [
        torch.cat([text[0, :4], marks, text[0, 4:9]]),
        text[1, :11],
        torch.cat([marks, text[2, :3], marks, text[2, 3:6]]),
    ]
    length = max(len(row) for row in rows)
    pixels = torch.rand(5, 3, 8, 8, generator=seeded(0)) * 2 - 1
    first = {
        "input_ids": torch.stack([torch.cat([torch.full((length - len(row),), 9), row]) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows]),
        "pixel_values": pixels[[0, 2, 3]],
    }
    more = [
        torch.cat([text[0, 20:23], marks, text[0, 23:26]]),
        text[1, 20:42],
        torch.cat([text[2, 20:21], marks, text[2, 21:26]]),
    ]
    return first, torch.stack(more), pixels


def empty_cache(model, kind):
    if kind == "dynamic":
        return DynamicCache(config=model.config.text_config)
    return StaticCache(config=model.config.text_config, max_cache_len=96)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("prefill", ["generate", "forward"])
@pytest.mark.parametrize("has_new_images", [True, False])
def test_the_complete_chat_goes_on_from_a_cache(model, chat, monkeypatch, kind, prefill, has_new_images):
    """Images included: those that are cached are not encoded again, whether they are given or not."""
    first, more, pixels = chat
    cache, before = empty_cache(model, kind), first["input_ids"]
    if prefill == "generate":
        before = model.generate(**first, past_key_values=cache, **GREEDY)
    else:
        model(**first, past_key_values=cache, use_cache=True)
    more = more if has_new_images else random_text(3, 7, seed=5)
    turn = torch.cat([before, more], 1)
    new_mask = torch.ones(3, turn.shape[1] - first["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([first["attention_mask"], new_mask], 1)
    complete = {"input_ids": turn, "pixel_values": pixels if has_new_images else first["pixel_values"]}
    new = {"input_ids": turn} | ({"pixel_values": pixels[[1, 4]]} if has_new_images else {})
    tail = {**new, "input_ids": turn[:, int(cache.get_seq_length()) :]}
    expected = model.generate(**complete, attention_mask=mask, use_cache=False, **GREEDY)[:, -NEW:]
    encoded = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda images, **kwargs: encoded.append(len(images)) or encode(images))
    for inputs in (complete, new, tail):
        output = model.generate(**inputs, attention_mask=mask, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(output[:, -NEW:], expected)
    assert encoded == ([2, 2, 2] if has_new_images else [])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("ends_in_image", [False, True])
def test_a_prompt_that_is_cached_completely(model, chat, kind, ends_in_image):
    """The last token, or image, is read once more for what follows it."""
    first, _, _ = chat
    if ends_in_image:
        ids = torch.cat([random_text(2, 5), image_marks(model, 2)], 1)
        first = {"input_ids": ids, "pixel_values": first["pixel_values"][:2]}
    expected = new_tokens(model, first, **GREEDY)
    cache = empty_cache(model, kind)
    model(**first, past_key_values=cache, use_cache=True)
    assert torch.equal(new_tokens(model, first, past_key_values=cache, **GREEDY), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("gives_mask", [False, True])
def test_embeddings_of_the_complete_chat_go_on_from_a_cache(model, chat, kind, gives_mask):
    first, more, pixels = chat
    ids = torch.cat([first["input_ids"], more], 1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(more)], 1)
    expected = model.generate(ids, attention_mask=mask, pixel_values=pixels, **GREEDY)[:, -NEW:]
    cache = empty_cache(model, kind)
    model(**first, past_key_values=cache, use_cache=True)
    embeds = model.get_input_embeddings()(ids)
    given = {"image_token_mask": ids == IMAGE} if gives_mask else {}
    output = model.generate(
        inputs_embeds=embeds, attention_mask=mask, pixel_values=pixels, past_key_values=cache, **given, **GREEDY
    )
    assert torch.equal(output, expected)


def test_padding_inside_a_chat_takes_no_position(model, prompt):
    """A row whose answer ended early is padded behind it, which a mask hides in the next turn."""
    ids = torch.cat([prompt["input_ids"], random_text(2, 3, seed=5)], 1)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    _, cache = run_pieces(model, [ids], [prompt["latents"]])
    turn, new_mask = random_text(2, 4, seed=6), torch.ones(2, 4, dtype=torch.long)
    full = {"input_ids": torch.cat([ids, turn], 1), "attention_mask": torch.cat([mask, new_mask], 1)}
    with torch.no_grad():
        expected = model(**full, latents=prompt["latents"]).logits[:, -4:]
        logits = model(turn, attention_mask=full["attention_mask"], past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
    expected = model.generate(**full, latents=prompt["latents"], **GREEDY)[:, -NEW:]
    full["input_ids"] = turn
    assert torch.equal(model.generate(**full, past_key_values=cache, **GREEDY)[:, -NEW:], expected)


def test_a_cached_prompt_for_several_rows(model, prompt):
    """One prompt is read once, and its cache repeated for each of three questions."""
    one = {name: value[:1] for name, value in prompt.items()}
    _, cache = run_pieces(model, [one["input_ids"]], [one["latents"]])
    cache.batch_repeat_interleave(3)
    ids = torch.cat([one["input_ids"].repeat(3, 1), random_text(3, 4, seed=7)], 1)
    expected = model.generate(ids, latents=one["latents"].repeat(3, 1, 1, 1), **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("columns", [4, 20])
def test_a_cache_that_does_not_fit_the_inputs(model, prompt, columns):
    _, cache = run_pieces(model, [prompt["input_ids"]], [prompt["latents"]])
    with pytest.raises(ValueError, match="`attention_mask` must have 29 columns"):
        model.generate(
            random_text(2, 4), attention_mask=torch.ones(2, columns, dtype=torch.long), past_key_values=cache
        )


def test_cache_of_another_batch_size(model, prompt):
    _, cache = run_pieces(model, [prompt["input_ids"]], [prompt["latents"]])
    with pytest.raises(ValueError, match="positions of 2 rows; got 1"):
        model(random_text(1, 3), past_key_values=cache)


def test_position_ids_given_equal_those_made(model, mixed):
    batch, _ = mixed
    position_ids = shared_position_ids(batch["input_ids"] == IMAGE, 16, batch["attention_mask"])
    with torch.no_grad():
        assert torch.equal(model(**batch, position_ids=position_ids).logits, model(**batch).logits)


def test_unknown_generation_mode(model):
    with pytest.raises(ValueError, match="`generation_mode` must be 'text' or 'image'; got 'audio'"):
        model.generate(random_text(1, 3), generation_mode="audio")


# ------------------------------------------------------------------------------------------------------- pictures


def draw(model, batch=2, **arguments):
    defaults = {
        "input_ids": random_text(batch, 6),
        "guidance_scale": 2.0,
        "num_ar_steps": 3,
        "num_inference_steps": 3,
        "output_type": "latent",
    }
    if arguments.get("guidance_scale", 2.0) > 1 and "negative_input_ids" not in arguments:
        defaults["negative_input_ids"] = random_text(1, 3, seed=1).repeat(batch, 1)
    return model.generate_images(**{**defaults, **arguments})


def test_generator_list_gives_the_same_picture_whatever_the_batch(model):
    together = draw(model, 3, generator=[seeded(seed) for seed in (5, 6, 7)])
    for row, seed in enumerate((5, 6, 7)):
        own = {"input_ids": random_text(3, 6)[row : row + 1], "generator": [seeded(seed)]}
        # Matrix products of other shapes round differently.
        torch.testing.assert_close(draw(model, 1, **own), together[row : row + 1], atol=ROUNDS_ATOL, rtol=ROUNDS_ATOL)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_one_generator_gives_the_ith_picture_whatever_the_batch(model):
    together = draw(model, 3, generator=seeded(5))
    for batch in (1, 2):
        own = draw(model, batch, input_ids=random_text(3, 6)[:batch], generator=seeded(5))
        torch.testing.assert_close(own, together[:batch], atol=ROUNDS_ATOL, rtol=ROUNDS_ATOL)
    # The same prompt gives different pictures.
    same = draw(model, 2, input_ids=random_text(1, 6).repeat(2, 1), generator=seeded(5))
    assert (same[0] - same[1]).abs().max() > 0.1


def test_a_generator_gives_the_same_image_alone_and_in_a_list(model):
    settings = {"guidance_scale": 2.0, "num_ar_steps": 3, "num_inference_steps": 3, "output_type": "latent"}
    prompt = {"input_ids": random_text(1, 6), "negative_input_ids": random_text(1, 3, seed=1)}
    alone = draw(model, 1, generator=seeded(7))
    for own in (seeded(7), [seeded(7)], (seeded(7),)):
        assert torch.equal(model.generate(**prompt, **settings, generator=own, generation_mode="image"), alone)
    assert torch.equal(draw(model, 1, generator=[seeded(7)]), alone)


def test_the_kth_image_of_a_generator_has_its_kth_seed(model):
    text = random_text(1, 6)
    one, two = seeded(7), seeded(7)
    expected = draw(model, 3, generator=two, input_ids=text.repeat(3, 1))
    listed = draw(model, 4, generator=[one, seeded(5), one, one], input_ids=text.repeat(4, 1))[[0, 2, 3]]
    torch.testing.assert_close(listed, expected, atol=ROUNDS_ATOL, rtol=ROUNDS_ATOL)
    # A second call goes on from there.
    assert torch.equal(draw(model, 1, generator=one), draw(model, 1, generator=[two]))


def test_manual_seed(model):
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(draw(model))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_prompt_null_prompt_and_guidance_change_the_picture(model):
    base = draw(model, generator=seeded(1))
    for arguments in (
        {"input_ids": random_text(2, 6, seed=9)},
        {"negative_input_ids": random_text(2, 3, seed=9)},
        {"guidance_scale": 4.0},
        {"guidance_scale": 1.0},
    ):
        assert (draw(model, generator=seeded(1), **arguments) - base).abs().amax((1, 2, 3)).min() > 1e-3
    # Below and at 1 guidance is off, with or without a null prompt.
    unguided = draw(model, generator=seeded(1), guidance_scale=1.0)
    given = draw(model, generator=seeded(1), guidance_scale=1.0, negative_input_ids=random_text(2, 3))
    assert torch.equal(unguided, given)


def test_the_same_prompt_as_null_prompt_leaves_the_picture_as_it_is(model):
    """v_u + w (v_c - v_u) = v_c when both prompts are the same."""
    ids = random_text(2, 6)
    unguided = draw(model, generator=seeded(1), guidance_scale=1.0)
    guided = draw(model, generator=seeded(1), guidance_scale=1.5, negative_input_ids=ids)
    torch.testing.assert_close(guided, unguided, atol=1e-5, rtol=1e-5)


def test_inpainting_keeps_known_tokens_bit_for_bit(model):
    latents, mask = random_latents(model, 2), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :7], mask[1, 9:] = True, True
    before = latents.clone()
    output = draw(model, latents=latents, latent_mask=mask, generator=seeded(0))
    known = ~mask.view(2, 1, 4, 4).expand_as(latents)
    assert torch.equal(output[known], latents[known]) and torch.equal(latents, before)
    assert (output - latents)[~known].abs().min() > 0
    # The known tokens are seen: others give other pictures.
    other = draw(model, latents=latents.masked_fill(known, 2.0), latent_mask=mask, generator=seeded(0))
    assert (other - output)[~known].abs().max() > 1e-3


def test_callback_gets_the_partial_latents(model):
    calls = []
    output = draw(
        model,
        num_ar_steps=4,
        generator=seeded(0),
        callback=lambda step, steps, latents, hidden: calls.append((step, steps, latents, hidden)),
    )
    assert [(step, steps) for step, steps, _, _ in calls] == [(index, 4) for index in range(4)]
    # The cosine schedule of 16 tokens in 4 steps: floor(16 cos) = 14, 11, 6, 0.
    assert [hidden.sum(-1).tolist() for *_, hidden in calls] == [[14, 14], [11, 11], [6, 6], [0, 0]]
    assert torch.equal(calls[-1][2], output)
    for _, _, latents, hidden in calls:
        drawn = ~hidden.view(2, 1, 4, 4).expand_as(latents)
        assert torch.equal(latents[drawn], output[drawn]) and not latents[~drawn].any()


def test_callback_sees_nothing_of_hidden_places(model):
    latents, mask = random_latents(model, 2), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :10] = True
    seen = []
    draw(
        model,
        latents=latents,
        latent_mask=mask,
        num_ar_steps=3,
        generator=seeded(0),
        callback=lambda step, steps, partial, hidden: seen.append((partial, hidden)),
    )
    for partial, hidden in seen:
        hidden = hidden.view(2, 1, 4, 4).expand_as(partial)
        assert not partial[hidden].any() and partial[~hidden].all()
    assert seen[0][1].any()


def test_callback_may_change_the_latents(model):
    def double(step, steps, latents, hidden):
        return {"latents": (latents * 2).double()} if step == steps - 1 else None

    output = draw(model, generator=seeded(0))
    assert torch.equal(draw(model, generator=seeded(0), callback=double), output * 2)


@pytest.mark.parametrize(("scale", "meant"), [(0.0, 1.0), (1, 1.0), (3.5, 3.5)])
def test_callback_may_change_the_guidance(model, monkeypatch, scale, meant):
    def change(step, steps, latents, hidden):
        return {"guidance_scale": scale} if step == 0 else None

    changed = draw(model, generator=seeded(0), callback=change)
    constant = draw(model, generator=seeded(0))
    # 14 of 16 tokens are left after the first of three rounds, and there they differ.
    num_same = (changed == constant).all(1).flatten(1).sum(-1)
    first_round = tokens_per_step(16, 3)[0]
    assert num_same.tolist() == [first_round] * 2
    monkeypatch.setattr(
        GenerationState,
        "guidance_scales",
        lambda run, share, steps: [2.0 if share == first_round / 16 else meant] * steps,
    )
    assert torch.equal(changed, draw(model, generator=seeded(0)))


def test_callback_cannot_begin_guidance(model):
    with pytest.raises(ValueError, match="must leave guidance off in a call that began without; .* 2. Begin with one"):
        draw(model, guidance_scale=1.0, callback=lambda *args: {"guidance_scale": 2})
    unguided = draw(model, generator=seeded(0), guidance_scale=1.0)
    options = {"guidance_scale": 1.0, "callback": lambda *args: {"guidance_scale": 1.0}}
    assert torch.equal(draw(model, generator=seeded(0), **options), unguided)


def test_defaults_come_from_the_config(model):
    ids, null = random_text(1, 5), random_text(1, 3)
    steps = []

    def count(step, total, latents, hidden):
        steps.append(total)

    output = model.generate_images(ids, negative_input_ids=null, generator=seeded(0), callback=count)
    assert steps == [4] * 4 and output.shape == (1, 3, 8, 8) and output.dtype == torch.float32
    explicit = {"guidance_scale": 3.0, "num_ar_steps": 4, "num_inference_steps": 5}
    same = model.generate_images(ids, negative_input_ids=null, generator=seeded(0), **explicit)
    assert torch.equal(output, same)
    # Fewer hidden tokens than the config's rounds: one round each.
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, :2] = True
    steps.clear()
    latents = random_latents(model, 1)
    model.generate_images(ids, negative_input_ids=null, latents=latents, latent_mask=mask, callback=count)
    assert steps == [2, 2]


def rounds_and_steps(model, monkeypatch, **arguments):
    """Latents, and per autoregressive round the rows of each call of the network."""
    calls, call = [], CachedDiffusionHead.__call__

    def counted(self, step, noisy_latents):
        calls[-1].append(len(noisy_latents))
        return call(self, step, noisy_latents)

    monkeypatch.setattr(CachedDiffusionHead, "__call__", counted)
    condition = FusedPLoRAContext.condition
    monkeypatch.setattr(FusedPLoRAContext, "condition", lambda self, *args: calls.append([]) or condition(self, *args))
    arguments = {"num_ar_steps": None, "num_inference_steps": None} | arguments
    latents = draw(model, generator=seeded(0), **arguments)
    return latents, calls


PRESET_ROUNDS = {"paper": [100] * 16, "balanced": [50, 35, 20, 5], "fast": [10, 10]}


@pytest.mark.parametrize("preset", PRESET_ROUNDS)
def test_presets(model, monkeypatch, preset):
    """16 latents: one, four and eight a round in the mean."""
    assert PRESET_ROUNDS.keys() == PRESETS.keys()
    latents, calls = rounds_and_steps(model, monkeypatch, preset=preset)
    assert [len(round_) for round_ in calls] == PRESET_ROUNDS[preset]
    explicit = {"num_ar_steps": len(calls), "num_inference_steps": PRESETS[preset].num_inference_steps}
    if preset == "fast":
        explicit["scheduler"] = scheduler_like(DPMSolverMultistepScheduler)
    assert torch.equal(draw(model, generator=seeded(0), **explicit), latents)
    assert torch.isfinite(latents).all() and latents.std() > 0.1
    # What is given wins.
    _, calls = rounds_and_steps(model, monkeypatch, preset=preset, num_inference_steps=3)
    assert [len(round_) for round_ in calls] == [3] * len(PRESET_ROUNDS[preset])


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_preset_takes_at_least_one_step_and_no_more_than_there_are_latents_to_generate(model, preset):
    chosen = model.image_preset(preset)
    assert model.num_ar_steps(chosen, 1) == 1 and 1 < model.num_ar_steps(chosen, 16) <= 16
    assert model.num_ar_steps(dataclasses.replace(chosen, ar_steps_per_latent=1e-3), 16) == 1


def test_steps_change_evenly_over_the_rounds(model, monkeypatch):
    _, calls = rounds_and_steps(model, monkeypatch, num_ar_steps=3, num_inference_steps=(9, 2))
    assert [len(round_) for round_ in calls] == [9, 6, 2]
    one_number = draw(model, generator=seeded(0), num_ar_steps=3, num_inference_steps=4)
    assert torch.equal(draw(model, generator=seeded(0), num_ar_steps=3, num_inference_steps=(4, 4)), one_number)


def test_guidance_interval(model, monkeypatch):
    whole = draw(model, generator=seeded(0), num_inference_steps=4)
    assert torch.equal(draw(model, generator=seeded(0), num_inference_steps=4, guidance_interval=(0.0, 1.0)), whole)
    latents, calls = rounds_and_steps(
        model, monkeypatch, num_ar_steps=1, num_inference_steps=4, guidance_interval=(0.25, 0.75)
    )
    # Two pictures of 16 tokens: the unconditional half in the two middle steps only.
    assert calls == [[32, 64, 64, 32]]
    # A step is where its middle is: 1/8, 3/8, 5/8 and 7/8 here, with the start of the interval and without its end.
    for interval, rows in (
        ((0.3, 0.6), [32, 64, 32, 32]),
        ((0.125, 0.375), [64, 32, 32, 32]),
        ((0.8, 1.0), [32, 32, 32, 64]),
    ):
        options = {"num_ar_steps": 1, "num_inference_steps": 4, "guidance_interval": interval}
        assert rounds_and_steps(model, monkeypatch, **options)[1] == [rows]
    unguided = draw(model, generator=seeded(0), num_ar_steps=1, num_inference_steps=4, guidance_scale=1.0)
    assert not torch.allclose(latents, unguided, atol=1e-3)


@pytest.mark.parametrize("order", ["checkerboard", "raster"])
def test_orders(model, order):
    seen = []
    draw(
        model,
        generator=[seeded(0), seeded(1)],
        num_ar_steps=2,
        order=order,
        callback=lambda step, steps, latents, mask: seen.append(mask.clone()),
    )
    hidden = seen[0].view(2, 4, 4)
    places = torch.arange(16).view(4, 4)
    if order == "raster":
        assert torch.equal(hidden, (places >= 5).expand(2, -1, -1))
    else:
        is_white = (places // 4 + places % 4) % 2 == 1
        assert hidden[:, is_white].all() and (~hidden).flatten(1).sum(-1).tolist() == [5, 5]


def test_generate_with_generation_mode_image(model):
    ids = random_text(2, 5)
    arguments = {"guidance_scale": 1.0, "num_ar_steps": 2, "num_inference_steps": 2}
    expected = model.generate_images(ids, generator=seeded(0), **arguments)
    assert torch.equal(model.generate(ids, generation_mode="image", generator=seeded(0), **arguments), expected)


SCHEDULERS = {
    "DDPM": DDPMScheduler,
    "DDIM": DDIMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "Euler": EulerDiscreteScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(model, name):
    scheduler = SCHEDULERS[name].from_config(model.default_scheduler().config)
    first = draw(model, scheduler=scheduler, generator=seeded(0), num_inference_steps=6)
    assert torch.isfinite(first).all() and first.std() > 0.1
    # A used scheduler keeps nothing of the picture before.
    assert torch.equal(draw(model, scheduler=scheduler, generator=seeded(0), num_inference_steps=6), first)
    rows = [
        draw(model, 1, input_ids=random_text(2, 6)[row : row + 1], scheduler=scheduler, generator=[generator],
             num_inference_steps=6)
        for row, generator in enumerate((seeded(3), seeded(4)))
    ]  # fmt: skip
    together = draw(model, scheduler=scheduler, generator=[seeded(3), seeded(4)], num_inference_steps=6)
    torch.testing.assert_close(torch.cat(rows), together, atol=1e-4, rtol=1e-4)


def test_a_scheduler_that_cannot_take_so_few_steps_is_named(model):
    scheduler = PNDMScheduler.from_config(model.default_scheduler().config)
    assert torch.isfinite(draw(model, scheduler=scheduler, num_inference_steps=4)).all()
    with pytest.raises(ValueError, match="`num_inference_steps` .*PNDMScheduler"):
        draw(model, scheduler=scheduler, num_inference_steps=3)


def test_timesteps_that_round_to_the_same(model):
    """Karras sigmas crowd at the noisy end; diffusers looks the first timestep up and finds the second such."""
    config = model.default_scheduler().config
    scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    assert torch.isfinite(draw(model, scheduler=scheduler, generator=seeded(0), num_inference_steps=6)).all()


def test_explicit_ddpm_equals_the_default(model):
    scheduler = DDPMScheduler.from_config(model.default_scheduler().config)
    assert torch.equal(draw(model, scheduler=scheduler, generator=seeded(0)), draw(model, generator=seeded(0)))
    config = scheduler.config
    assert (config.beta_schedule, config.prediction_type) == ("squaredcos_cap_v2", "v_prediction")
    assert not config.clip_sample and config.variance_type == "fixed_small" and config.num_train_timesteps == 1000


def test_ddim_draws_no_noise_after_the_start(model):
    """Its result is a function of the starting noise, so more steps come closer to one limit."""
    # diffusers' DDIM steps by T // n, which is true to "trailing" and drifts from "linspace".
    scheduler = DDIMScheduler.from_config(model.default_scheduler().config, timestep_spacing="trailing")
    settings = {"scheduler": scheduler, "guidance_scale": 1.0, "num_ar_steps": 1}
    outputs = {
        steps: draw(model, generator=seeded(0), num_inference_steps=steps, **settings) for steps in (10, 50, 200)
    }
    again = draw(model, generator=seeded(0), num_inference_steps=200, **settings)
    assert torch.equal(outputs[200], again)
    far, near = ((outputs[steps] - outputs[200]).abs().mean() for steps in (10, 50))
    assert near < 0.6 * far
    # The paper's DDPM draws noise at every step and has no such limit.
    ddpm = {**settings, "scheduler": None}
    noisy = [draw(model, generator=seeded(0), num_inference_steps=steps, **ddpm) for steps in (50, 200)]
    assert (noisy[0] - noisy[1]).abs().mean() > 3 * near


def test_epsilon_model_draws():
    model = tiny_model(diffusion_config={"prediction_type": "epsilon"})
    assert model.default_scheduler().config.prediction_type == "epsilon"
    output = draw(model, generator=seeded(0), guidance_scale=1.0)
    assert torch.isfinite(output).all()
    with pytest.raises(ValueError, match="must have `prediction_type` 'epsilon'.*got 'v_prediction'"):
        draw(model, scheduler=DDPMScheduler(prediction_type="v_prediction"))


def test_eager_attention_draws_the_same(model):
    eager = tiny_model(attn_implementation="eager")
    # Both feed each round's tokens to the next.
    torch.testing.assert_close(
        draw(eager, generator=seeded(0)), draw(model, generator=seeded(0)), atol=1e-4, rtol=1e-4
    )


def test_bfloat16_draws_close_to_float32(model):
    output = draw(tiny_model().to(torch.bfloat16), generator=seeded(0), guidance_scale=1.0)
    assert output.dtype == torch.float32
    reference = draw(model, generator=seeded(0), guidance_scale=1.0)
    # 0.4 percent per rounding over three layers, nine network calls and three rounds.
    assert (output - reference).abs().mean() < 0.1 * reference.std()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_does_not_matter(model, dtype):
    expected = draw(model, generator=seeded(0))
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(draw(model, generator=seeded(0)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_drawing_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = random_text(2, 6)
    draw(model, input_ids=ids, generator=seeded(0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(ids, random_text(2, 6)) and not model.training


def scheduler_like(scheduler_class, **options):
    return scheduler_class.from_config(tiny_model().default_scheduler().config, **options)


COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ERRORS = {
    "AR steps": (
        {"num_ar_steps": 17},
        "`num_ar_steps`",
    ),
    "no AR step": ({"num_ar_steps": 0}, "`num_ar_steps`"),
    "diffusion steps": ({"num_inference_steps": 1001}, "`num_inference_steps`"),
    "no diffusion step": ({"num_inference_steps": 0}, "`num_inference_steps`"),
    "no null prompt": ({"negative_input_ids": None}, "`guidance_scale`"),
    "null prompts": (
        {"negative_input_ids": torch.ones(1, 3, dtype=torch.long)},
        "`negative_input_ids`",
    ),
    "prediction type": (
        {"scheduler": DDPMScheduler(prediction_type="epsilon")},
        "`prediction_type`",
    ),
    "default prediction type": ({"scheduler": DDIMScheduler()}, "`scheduler`"),
    "generators": ({"generator": [torch.Generator()]}, "`generator`"),
    "image tokens": (
        {"input_ids": torch.full((2, 4), IMAGE)},
        "`input_ids`",
    ),
    "prompt length": ({"input_ids": torch.ones(2, 512, dtype=torch.long)}, "`input_ids`"),
    "right padding": (
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])},
        "`attention_mask`",
    ),
    "preset": ({"preset": "quick"}, "`preset`"),
    "order": ({"order": "spiral"}, "`order`"),
    "three step numbers": ({"num_inference_steps": (3, 2, 1)}, "`num_inference_steps`"),
    "last step number": ({"num_inference_steps": (3, 0)}, "`num_inference_steps`"),
    "interval": (
        {"guidance_interval": (0.5, 0.2)},
        "`guidance_interval`",
    ),
    "empty interval": (
        {"guidance_interval": (0.5, 0.5)},
        "`guidance_scale=1`",
    ),
    "preset type": ({"preset": ["paper"]}, "`preset`"),
    "fast": ({"fast": "no"}, "`fast`"),
    "no text": ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "`input_ids`"),
    "half an interval": ({"guidance_interval": 0.5}, "`guidance_interval`"),
    "guidance schedule": ({"guidance_schedule": "cosine"}, "`guidance_schedule`"),
    "latents list": (
        {"latents": [0.0], "latent_mask": torch.ones(2, 16, dtype=torch.bool)},
        "`latents`",
    ),
    "mask type": (
        {"latents": torch.zeros(2, 4, 4, 4), "latent_mask": torch.ones(2, 16)},
        "`latent_mask`",
    ),
    "other betas": (
        {"scheduler": scheduler_like(DDPMScheduler, trained_betas=[1e-4] * 1000)},
        "`scheduler`",
    ),
    "one leading step": (
        {"scheduler": scheduler_like(DDIMScheduler, timestep_spacing="leading"), "num_inference_steps": 1},
        "`timestep_spacing`",
    ),
    "one leading step at the end": (
        {"scheduler": scheduler_like(DDIMScheduler, timestep_spacing="leading"), "num_inference_steps": (3, 1)},
        "`timestep_spacing`",
    ),
    "almost the betas": (
        {"scheduler": scheduler_like(DDPMScheduler, trained_betas=(0.98 * DDPMScheduler(**COSINE).betas).tolist())},
        "`scheduler`",
    ),
    "thresholding": ({"scheduler": scheduler_like(DDPMScheduler, thresholding=True)}, "`thresholding`"),
    "too many null prompts": ({"negative_input_ids": torch.ones(3, 3, dtype=torch.long)}, "`negative_input_ids`"),
    "output type": ({"output_type": "pil"}, "`output_type`"),
    "unknown argument": ({"num_steps": 3}, "num_steps"),
    "mask alone": (
        {"latent_mask": torch.ones(2, 16, dtype=torch.bool)},
        "`latents`",
    ),
    "latents alone": ({"latents": torch.zeros(2, 4, 4, 4)}, "`latents`"),
    "shapes": (
        {"latents": torch.zeros(2, 4, 8, 8), "latent_mask": torch.ones(2, 16, dtype=torch.bool)},
        "`latents`",
    ),
    "uneven masks": (
        {"latents": torch.zeros(2, 4, 4, 4), "latent_mask": torch.arange(32).view(2, 16) < 20},
        "`latent_mask`",
    ),
    "nothing hidden": (
        {"latents": torch.zeros(2, 4, 4, 4), "latent_mask": torch.zeros(2, 16, dtype=torch.bool)},
        "`latent_mask`",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(model, name):
    arguments, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        draw(model, **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_raise_instead_of_a_black_picture(value):
    model = tiny_model()
    with torch.no_grad():
        model.diffusion_mlp.output_projection.bias[0] = value
    with pytest.raises(ValueError, match="expected finite latents; got NaN or infinite values"):
        draw(model)


def test_known_nan_latents_raise(model):
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :4] = True
    latents = torch.zeros(2, 4, 4, 4)
    latents[1, 2, 3, 3] = float("nan")  # one number
    with pytest.raises(ValueError, match="expected finite latents where `latent_mask` is False"):
        draw(model, latents=latents, latent_mask=mask)


def test_the_ends_of_ranges_are_taken(model):
    longest = model.config.text_config.max_position_embeddings - 1
    settings = {"num_ar_steps": 1, "num_inference_steps": 2, "guidance_scale": 0}
    assert torch.isfinite(draw(model, input_ids=random_text(1, longest), **settings)).all()
    most = model.config.diffusion_config.num_train_timesteps
    assert torch.isfinite(draw(model, **{**settings, "num_inference_steps": most})).all()


def test_gradient_checkpointing_is_no_obstacle_in_eval_mode():
    model = tiny_model()
    expected = draw(model, generator=seeded(0))
    model.gradient_checkpointing_enable()
    assert torch.equal(draw(model, generator=seeded(0)), expected)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        draw(model.train())


def test_a_callback_that_writes_into_its_mask_changes_nothing(model):
    def write(step, steps, partial, mask):
        mask.fill_(True)

    assert torch.equal(draw(model, generator=seeded(0), callback=write), draw(model, generator=seeded(0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": float("nan")}, "`guidance_scale`"),
        ({"guidance_scale": -1}, "`guidance_scale`"),
        ({"guidance_scale": "3"}, "`guidance_scale`"),
        ({"num_ar_steps": 2.5}, "`num_ar_steps`"),
        ({"num_inference_steps": "5"}, "`num_inference_steps`"),
        ({"generator": 0}, "`generator`"),
        ({"generator": [None]}, "`generator`"),
        ({"input_ids": [[1]]}, "`input_ids`"),
        ({"input_ids": torch.ones(1, 4)}, "`input_ids`"),
        ({"input_ids": torch.tensor([[1, 128]])}, "`input_ids`"),
        ({"input_ids": torch.tensor([[-1, 1]])}, "`input_ids`"),
        ({"attention_mask": [[1] * 4]}, "`attention_mask`"),
        (
            {"attention_mask": torch.ones(1, 3)},
            "`attention_mask`",
        ),
        ({"attention_mask": torch.ones(4)}, "`attention_mask`"),
        ({"negative_input_ids": [[1]]}, "`negative_input_ids`"),
        ({"negative_input_ids": torch.ones(1, 3)}, "`negative_input_ids`"),
        ({"negative_input_ids": torch.tensor([[500]])}, "`negative_input_ids`"),
        (
            {"negative_input_ids": random_text(1, 3), "negative_attention_mask": torch.ones(1, 2)},
            "`negative_attention_mask`",
        ),
        ({"guidance_scale": True}, "`guidance_scale`"),
        ({"callback": 5}, "`callback`"),
        ({"callback": lambda *args: {"latent": 0}}, "`latents`"),
        ({"callback": lambda *args: {"guidance_scale": "2"}}, "`guidance_scale`"),
        (
            {"callback": lambda step, steps, partial, mask: {"latents": partial * float("nan")}},
            "`callback`",
        ),
        (
            {"scheduler": scheduler_like(DPMSolverMultistepScheduler, use_flow_sigmas=True)},
            "`use_flow_sigmas`",
        ),
        (
            {"scheduler": scheduler_like(DDPMScheduler, variance_type="learned_range")},
            "`variance_type`",
        ),
        ({"scheduler": scheduler_like(EDMEulerScheduler)}, "`scheduler`"),
        ({"scheduler": scheduler_like(DDIMInverseScheduler)}, "`scheduler`"),
        ({"scheduler": DDIMScheduler}, "`scheduler`"),
        ({"scheduler": DDPMScheduler(prediction_type="v_prediction")}, "`beta_schedule`"),
        (
            {"scheduler": DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")},
            "`clip_sample`",
        ),
    ],
)
def test_bad_drawing_arguments(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.generate_images(**{"input_ids": random_text(1, 4), "guidance_scale": 1, **arguments})


def test_the_callers_scheduler_is_left_alone():
    model = tiny_model()
    scheduler = model.default_scheduler()
    model.generate_images(random_text(1, 4), guidance_scale=1, scheduler=scheduler)
    assert scheduler.num_inference_steps is None
