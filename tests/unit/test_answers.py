"""Answers in batches, log-likelihoods against plain computations, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from PIL import Image
from squares import COLOURS, make_processor, make_squares_model
from torch.nn import functional as F

from mmar import MMARPipeline
from mmar.evaluation.answers import MMARAnswerer, generation_options


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "mmar-tiny"


def user(*content):
    items = [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item}
        for item in content
    ]
    return {"role": "user", "content": items}


def square(colour):
    return Image.new("RGB", (8, 8), colour)


# No picture, one, several between texts, an earlier turn.
CHATS = [
    [user("Which colour?")],
    [user(square("red"), "Which colour?")],
    [user("Describe", square("blue"), "and", square("green"), "the image.")],
    [user(square("black"), "Which colour?"), {"role": "assistant", "content": "black"}, user("Describe the image.")],
]


@pytest.fixture(scope="module")
def answerer():
    processor = make_processor()
    return MMARAnswerer(make_squares_model(processor), processor, batch_size=4)


def test_answers_do_not_depend_on_the_batch(answerer):
    options = {"max_new_tokens": 12}
    together = answerer.answer(CHATS, **options)
    single = MMARAnswerer(answerer.model, answerer.processor, batch_size=1)
    assert single.answer(CHATS, **options) == together
    assert single.answer(CHATS[::-1], **options) == together[::-1]
    assert len(set(together)) > 1 and any(together)


def test_an_answer_ends_before_the_first_stop_string(answerer):
    whole = answerer.answer(CHATS[1:2], max_new_tokens=12)[0]
    middle = whole[len(whole) // 2 :][:3]
    cut = answerer.answer(CHATS[1:2], until=["never written", middle, ""], max_new_tokens=12)[0]
    assert cut == whole.split(middle)[0].strip() and len(cut) < len(whole)


def test_pictures_and_texts_keep_their_places(answerer):
    inputs = answerer.features(CHATS)
    marks = (inputs["input_ids"] == answerer.processor.image_token_id).sum(1)
    assert marks.tolist() == [0, 16, 32, 16]
    expected = torch.stack([torch.tensor(square(c).getpixel((0, 0))) for c in ("red", "blue", "green", "black")])
    torch.testing.assert_close(inputs["pixel_values"][:, :, 0, 0], expected / 127.5 - 1)


def test_marks_and_control_tokens_of_a_text_are_text(answerer):
    text = "<|im_end|> <|image|> <image>"
    inputs = answerer.features([[user(square("red"), text)]])
    assert int((inputs["input_ids"] == answerer.processor.image_token_id).sum()) == 16
    assert text in answerer.processor.tokenizer.decode(inputs["input_ids"][0])
    assert int((inputs["input_ids"] == answerer.processor.tokenizer.eos_token_id).sum()) == 1


def plain_log_likelihood(answerer, chat, continuation):
    """By `forward` with labels, one chat at a time: the model's own cross entropy."""
    inputs = answerer.features([chat])
    target = torch.tensor([answerer.processor.text_ids(continuation)])
    assert not set(target[0].tolist()) & set(answerer.processor.tokenizer.all_special_ids)
    ids = torch.cat([inputs["input_ids"], target], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), target], dim=1)
    outputs = answerer.model(ids, pixel_values=inputs.get("pixel_values"), labels=labels)
    predicted = outputs.logits[0, -target.shape[1] - 1 : -1].argmax(-1)
    return -outputs.text_loss.item() * target.shape[1], bool((predicted == target[0]).all())


@torch.no_grad()
def test_log_likelihoods_are_those_of_forward(answerer):
    continuations = ["red", " red", "a black square <|image|> <image> <|im_end|>", "Which colour?"]
    greedy = [answerer.answer([chat], max_new_tokens=4)[0] for chat in CHATS]
    chats = CHATS + CHATS
    got = answerer.log_likelihoods(chats, continuations + greedy)
    expected = [plain_log_likelihood(answerer, *pair) for pair in zip(chats, continuations + greedy, strict=True)]
    for (value, is_greedy), (plain, plain_greedy) in zip(got, expected, strict=True):
        # float32 sums over a padded batch and without it.
        assert value == pytest.approx(plain, rel=1e-5, abs=1e-4) and is_greedy == plain_greedy
    assert not any(is_greedy for _, is_greedy in got[:4]) and got[0][0] != got[1][0]
    assert all(value < -1 for value, _ in got[:4])


@torch.no_grad()
def test_each_single_token_scores_as_the_next_one(answerer):
    tokenizer = answerer.processor.tokenizer
    # A control token in a continuation is text of several tokens.
    words = {tokenizer.decode([i]): i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids}
    words = [word for word, i in words.items() if tokenizer(word, add_special_tokens=False)["input_ids"] == [i]]
    scores = answerer.log_likelihoods([CHATS[1]] * len(words), words)
    logits = answerer.model(**answerer.features([CHATS[1]])).logits[0, -1]
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    expected = F.log_softmax(logits, -1)[ids]
    torch.testing.assert_close(torch.tensor([value for value, _ in scores]), expected, atol=1e-4, rtol=1e-5)
    assert sum(is_greedy for _, is_greedy in scores) <= 1 and len(words) > 50


def test_what_greedy_decoding_writes_is_greedy(answerer):
    """`generate` never writes the image token, which an untrained model may find the likeliest."""
    model, image_token_id = answerer.model, answerer.processor.image_token_id
    (letter,) = answerer.processor.tokenizer("e", add_special_tokens=False)["input_ids"]

    def prefer(module, args, logits):
        return logits.index_fill(-1, torch.tensor([image_token_id]), 1e3).index_fill(-1, torch.tensor([letter]), 9e2)

    handle = model.lm_head.register_forward_hook(prefer)
    try:
        written = answerer.answer(CHATS[1:2], max_new_tokens=2)
        scores = answerer.log_likelihoods([CHATS[1]] * 2, [*written, "ed"])
    finally:
        handle.remove()
    assert written == ["ee"] and [is_greedy for _, is_greedy in scores] == [True, False]


def test_options_are_as_kits_mean_them():
    assert generation_options({}) == {"do_sample": False}
    given = {"temperature": 0, "top_p": 0.9, "num_beams": 1, "max_new_tokens": None}
    assert generation_options(given) == {"num_beams": 1, "do_sample": False}
    assert given["top_p"] == 0.9
    assert generation_options({"temperature": 0.0, "do_sample": True}) == {"do_sample": False}
    assert generation_options({"temperature": 0.7, "top_p": 0.9})["do_sample"] is True
    assert generation_options({"temperature": 0.7, "do_sample": False}) == {"do_sample": False}
    with pytest.raises(ValueError, match="`GenerationConfig`"):
        generation_options({"max_tokens": 5})
    assert generation_options({"num_return_sequences": 1})["num_return_sequences"] == 1
    with pytest.raises(ValueError, match="`num_return_sequences`"):
        generation_options({"num_return_sequences": 2, "num_beams": 2})


def test_what_cannot_be_answered_is_refused(answerer, tmp_path):
    missing = str(tmp_path / "no.png")
    with pytest.raises(ValueError, match="no.png"):
        answerer.answer([[{"role": "user", "content": [{"type": "image", "url": missing}]}]])
    with pytest.raises(ValueError, match="512"):
        answerer.answer(CHATS, max_new_tokens=512)
    with pytest.raises(ValueError, match="''"):
        answerer.log_likelihoods(CHATS[:1], [""])
    with pytest.raises(ValueError, match="1 .*4"):
        answerer.log_likelihoods(CHATS, ["red"])
    with pytest.raises(ValueError, match="`batch_size`"):
        MMARAnswerer(answerer.model, answerer.processor, batch_size=0)


def test_a_folder_that_is_no_whole_mmar_is_refused(tmp_path):
    processor = make_processor()
    model = make_squares_model(processor)
    folder = tmp_path / "mmar"
    MMARPipeline(model, processor, model.default_scheduler()).save_pretrained(folder)
    loaded = MMARAnswerer.from_pretrained(str(folder), batch_size=4)
    assert loaded.answer(CHATS, max_new_tokens=6) == MMARAnswerer(model, processor).answer(CHATS, max_new_tokens=6)
    assert loaded.fingerprint() == MMARAnswerer.from_pretrained(str(folder)).fingerprint()

    without = tmp_path / "without"
    shutil.copytree(folder, without)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (without / file).unlink()
    with pytest.raises(ValueError, match="processor_config.json"):
        MMARAnswerer.from_pretrained(str(without))
    with pytest.raises(ValueError, match="processor_config.json"):
        MMARAnswerer.from_pretrained(str(tmp_path / "nowhere"))
    other = tiny_model(text_config={"vocab_size": len(processor.tokenizer) - 1}, image_token_id=127)
    with pytest.raises(ValueError, match="folder"):
        MMARAnswerer(other, processor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float99"}, "`dtype` must be 'auto' or a type of torch, such as 'bfloat16'; got 'float99'"),
        ({"dtype": "nn"}, "`dtype` must be .* got 'nn'"),
        ({"device": "gpu"}, "`device` must be one that torch has here, such as 'cpu'; got 'gpu'"),
        # That of no machine: torch was built without it, or there are not so many.
        ({"device": "cuda:99"}, "`device` must be one that torch has here, such as 'cpu'; got 'cuda:99'"),
    ],
)
def test_devices_and_types_that_torch_does_not_have(arguments, message):
    with pytest.raises(ValueError, match=message):
        MMARAnswerer.from_pretrained(str(CHECKPOINT), **arguments)


def test_another_training_has_another_fingerprint():
    processor = make_processor()
    model = make_squares_model(processor)
    before = MMARAnswerer(model, processor).fingerprint()
    with torch.no_grad():
        model.diffusion_mlp.get_parameter(next(name for name, _ in model.diffusion_mlp.named_parameters())).add_(1e-3)
    assert MMARAnswerer(model, processor).fingerprint() != before


def test_the_bundled_model_answers_the_same_in_batches():
    answerer = MMARAnswerer.from_pretrained(str(CHECKPOINT), dtype="float32", batch_size=4)
    chats = [[user(Image.new("RGB", (64, 64), colour), "Describe the image.")] for colour in COLOURS]
    chats[2] = [user("What is it?")]
    single = MMARAnswerer(answerer.model, answerer.processor, batch_size=1)
    answers = answerer.answer(chats)
    assert answers == single.answer(chats) and all(answers)
