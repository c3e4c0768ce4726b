import io
import json
import tarfile
from itertools import islice
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import seeded, tiny_config
from PIL import Image
from squares import make_processor, make_rows, make_samples
from torch.utils.data import DataLoader

from mmar.modeling_mmar.configuration_mmar import IGNORE_INDEX
from mmar.processors.processing_mmar import TASKS
from mmar.training import sources
from mmar.training.collator import MMARDataCollator
from mmar.training.mixture import BLOCK
from mmar.training.recipe import DataArguments, SourceArguments
from mmar.training.rows import BadRow
from mmar.training.samples import SampleMaker, StepSampler, StreamedSamples, TrainingSource
from mmar.training.train import open_training_source, streamed_samples, training_samples


NUM_LATENTS = tiny_config().num_latents


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def maker(processor):
    return SampleMaker(processor, NUM_LATENTS, mask_ratio_min=0.5)


def text_of(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def learned(processor, sample):
    """The text that a sample's labels hold, which are its ids."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    assert all(label in (IGNORE_INDEX, token) for token, label in pairs)
    return text_of(processor, [label for label in sample["labels"] if label != IGNORE_INDEX])


def test_text_to_image_hides_latents_and_has_no_labels(processor, maker):
    for row in make_rows():
        sample = maker(row, "t2i", seeded(0))
        assert set(sample["labels"]) == {IGNORE_INDEX}
        assert sample["latent_mask"].shape == (1, NUM_LATENTS) and sample["latent_mask"].sum() >= 8  # of 16
        assert sample["pixel_values"].shape == (1, 3, 8, 8) and len(sample["seeds"]) == 1
        text = text_of(processor, sample["input_ids"])
        assert any(f"Generate an image: {caption}<" in text for caption in row["captions"])
        assert sample["input_ids"][-NUM_LATENTS:] == [processor.image_token_id] * NUM_LATENTS


def test_image_to_text_hides_nothing_and_labels_only_the_answer(processor, maker):
    seen = set()
    for number in range(20):
        row = make_rows()[number % 4]
        sample = maker(row, "i2t", seeded(number))
        assert not sample["latent_mask"].any() and sample["task"] == TASKS.index("i2t")
        answer = learned(processor, sample).removesuffix("<|im_end|>")
        pair = row["answers"].index(answer)
        assert row["questions"][pair] in text_of(processor, sample["input_ids"])
        seen.add(pair)
    assert seen == {0, 1}


def test_unconditional_has_the_null_prompt(processor, maker):
    null = processor.generation_inputs([None])["input_ids"][0].tolist()
    sample = maker(make_rows()[0], "uncond", seeded(0))
    assert sample["input_ids"] == null + [processor.image_token_id] * NUM_LATENTS
    assert sample["latent_mask"].any()


def test_a_caption_answers_where_there_are_no_questions(processor, maker):
    row = {"image": make_rows()[0]["image"], "captions": ["a red square"]}
    sample = maker(row, "i2t", seeded(0))
    assert learned(processor, sample) == "a red square<|im_end|>"
    assert "Describe the image." in text_of(processor, sample["input_ids"])


def chat(*turns):
    return [{"role": role, "content": content} for role, *content in turns]


TEXT = {"type": "text"}
PICTURE = {"type": "image"}


def test_chats_teach_every_answer_and_nothing_else(processor, maker):
    messages = chat(
        ("system", {"type": "text", "text": "Be brief."}),
        ("user", PICTURE, {"type": "text", "text": "Which colour?"}),
        ("assistant", {"type": "text", "text": "red"}),
        ("user", {"type": "text", "text": "And this?"}, PICTURE),
        ("assistant", {"type": "text", "text": "a blue square"}),
        ("user", {"type": "text", "text": "Thanks."}),
    )
    images = [make_rows()[i]["image"] for i in (0, 2)]
    sample = maker({"images": images, "messages": messages}, "i2t", seeded(0))
    assert learned(processor, sample) == "red<|im_end|>a blue square<|im_end|>"
    assert sample["pixel_values"].shape == (2, 3, 8, 8) and sample["latent_mask"].shape == (2, NUM_LATENTS)
    assert len(set(sample["seeds"])) == 2
    # The tokens are those of the template up to the last answer, in which no merge crosses into an answer.
    whole = processor.apply_chat_template(messages[:-1])
    whole = whole.replace(processor.image_token, processor.image_token * NUM_LATENTS)
    assert text_of(processor, sample["input_ids"]) + "\n" == whole
    prompt = processor.apply_chat_template(messages[:2], add_generation_prompt=True)
    prompt = prompt.replace(processor.image_token, processor.image_token * NUM_LATENTS)
    expected = processor.tokenizer(prompt)["input_ids"]
    assert sample["input_ids"][: len(expected)] == expected


def test_text_only_chats_have_no_pictures(processor, maker):
    messages = chat(("user", {"type": "text", "text": "Hi"}), ("assistant", {"type": "text", "text": "red"}))
    sample = maker({"messages": messages}, "i2t", seeded(0))
    assert "pixel_values" not in sample and sample["latent_mask"].shape == (0, NUM_LATENTS)
    batch = MMARDataCollator(processor, NUM_LATENTS)([sample, maker(make_rows()[0], "t2i", seeded(0))])
    assert batch["pixel_values"].shape == (1, 3, 8, 8) and batch["latent_mask"].shape == (1, NUM_LATENTS)


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"captions": []}, "t2i", "must have a caption; got none"),
        ({"image": None}, "t2i", "must have one picture; got 0"),
        ({"image": b"\x89PNG broken"}, "t2i", "pictures that can be read"),
        ({"captions": ["red " * 600]}, "t2i", "must have at most 512 positions"),
        ({"questions": None, "messages": chat(("user", PICTURE))}, "i2t", "turn of the assistant"),
        (
            {"questions": None, "messages": chat(("user", TEXT | {"text": "?"}), ("assistant", TEXT | {"text": "a"}))},
            "i2t",
            "as many pictures as its text has marks, 0; got 1",
        ),
        (
            {"questions": None, "messages": chat(("user", PICTURE), ("assistant", PICTURE))},
            "i2t",
            "must stand in a turn of user or system",
        ),
    ],
)
def test_rows_that_cannot_be_used(maker, row, task, message):
    with pytest.raises(BadRow, match=message):
        maker({**make_rows()[0], **row}, task, seeded(0))


def test_settings_are_checked(processor):
    for name, value, message in (
        ("mask_ratio_min", 1.0, "`mask_ratio_min`"),
        ("swap_rate", 2, "`swap_rate`"),
    ):
        with pytest.raises(ValueError, match=message):
            SampleMaker(processor, NUM_LATENTS, **{name: value})


# Views, swaps and cached latents


class Cache(list):
    """Latents whose mean tells kind, row and copy, with a std of 0."""

    def __init__(self, num_rows, num_copies):
        def tell(kind, row, copy):
            return torch.stack([torch.full((4, 4, 4), 100.0 * kind + 10 * row + copy), torch.zeros(4, 4, 4)]).half()

        super().__init__(
            {
                name: torch.stack([tell(kind, row, copy) for copy in range(num_copies)])
                for kind, name in enumerate(("picture", "content"))
            }
            for row in range(num_rows)
        )


def styled_rows():
    """The four squares with answers of each kind: rows 0 and 1 are of one style, 2 and 3 of another."""
    rows = make_rows()
    for index, row in enumerate(rows):
        style = "flat" if index < 2 else "bold"
        row["questions"] = ["Describe.", "What?", "Which style?"]
        row["answers"] = [f"a {row['answers'][0]} thing in {style}", row["answers"][0], style]
        row["depends_on"] = ["picture", "content", "style"]
        row["swaps"] = [row["answers"][1], None, None]
    return rows


def test_each_answer_is_shown_its_kind_of_views(processor, maker):
    source = TrainingSource(styled_rows(), Cache(4, 3), needs_relations=True)
    assert source.styles == {"flat": [0, 1], "bold": [2, 3]} and source.contents == ["red", "green", "blue", "black"]
    shown = {kind: set() for kind in ("picture", "content", "style")}
    for number in range(120):
        row = source.row(1)
        sample = maker(row, "i2t", seeded(number), source)
        answer = learned(processor, sample).removesuffix("<|im_end|>")
        kind = row["depends_on"][row["answers"].index(answer)]
        shown[kind] |= set(sample["latent_distributions"][:, 0].unique().tolist())
        if kind != "style":
            assert len(sample["latent_distributions"][:, 0].unique()) == 1
    assert shown == {"picture": {10, 11, 12}, "content": {110, 111, 112}, "style": {0, 1, 2, 10, 11, 12}}
    # What is drawn is the picture itself.
    assert (maker(source.row(1), "t2i", seeded(0), source)["latent_distributions"][:, 0] == 10).all()
    with pytest.raises(ValueError, match="4 .*3"):
        TrainingSource(make_rows(), Cache(3, 1))


def test_the_posterior_is_sampled(processor, maker):
    cache = Cache(4, 1)
    for views in cache:
        views["picture"][:, 1] = 0.5
    source = TrainingSource(make_rows(), cache)
    samples = [maker(source.row(2), "t2i", seeded(n), source) for n in range(20)]
    batch = MMARDataCollator(processor, NUM_LATENTS)(samples)
    assert "latent_distributions" not in batch and batch["latents"].shape == (20, 4, 4, 4)
    deviation = batch["latents"] - 20
    # 1280 normals of std 0.5: three standard errors are 0.03 and 0.04.
    assert deviation.std().item() == pytest.approx(0.5, abs=0.03)
    assert deviation.mean().item() == pytest.approx(0, abs=0.04)
    more = MMARDataCollator(processor, NUM_LATENTS, for_trainer=True)(samples)
    assert more["latent_distributions"].shape == (20, 2, 4, 4, 4) and "latents" not in more


def test_swapped_answers_teach_only_what_follows(processor):
    source = TrainingSource(styled_rows(), needs_relations=True)
    rows = [{**row, "questions": ["Describe."]} for row in styled_rows()]
    maker = SampleMaker(processor, NUM_LATENTS, swap_rate=1.0)
    contents = set()
    for number in range(160):
        row = rows[number % 4]
        sample = maker(row, "i2t", seeded(number), source)
        assert learned(processor, sample) == f" thing in {row['answers'][2]}<|im_end|>"
        written = text_of(processor, sample["input_ids"]).split("assistant\n")[1]
        contents.add((row["swaps"][0], written.split()[1]))
    # Any name stands before any picture's style, its own too.
    names = {row["swaps"][0] for row in rows}
    assert contents == {(own, other) for own in names for other in names}
    # With its own name a row teaches up to the name; without swaps all of it.
    maker.swap_rate = 1e-9
    assert learned(processor, maker(rows[0], "i2t", seeded(0), source)) == "a red"
    maker.swap_rate = 0.0
    assert learned(processor, maker(rows[0], "i2t", seeded(0), source)) == "a red thing in flat<|im_end|>"


# Samples by number


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def test_a_sample_depends_on_its_number_and_the_seed_only(processor):
    samples = make_samples(processor, 40)
    torch.manual_seed(5)
    for number in (0, 17, 39):
        same(samples[number], make_samples(processor, 40)[number])
    assert samples[3]["seeds"] != make_samples(processor, 40, seed=1)[3]["seeds"]
    assert [samples[i]["number"] for i in range(40)] == list(range(40))
    with pytest.raises(IndexError, match="got 40"):
        samples[40]


def test_proportions_are_exact(processor):
    samples = make_samples(processor, BLOCK, task_weights=(0.5, 0.45, 0.05))
    tasks = [TASKS[samples.mixture(number)[2]] for number in range(BLOCK)]
    assert {task: tasks.count(task) for task in TASKS} == {"t2i": 500, "i2t": 450, "uncond": 50}


def test_workers_give_the_same_batches(processor):
    samples = make_samples(processor, 24)
    collator = MMARDataCollator(processor, NUM_LATENTS, for_trainer=True)
    plain = list(DataLoader(samples, batch_size=4, collate_fn=collator))
    for num_workers in (1, 3):
        loader = DataLoader(samples, batch_size=4, collate_fn=collator, num_workers=num_workers)
        for batch, expected in zip(loader, plain, strict=True):
            same(batch, expected)


def test_one_mask_ratio_for_a_group(processor):
    samples = make_samples(processor, 32, task_weights=(1, 0, 0), mask_ratio_group=8)
    hidden = [int(samples[i]["latent_mask"].sum()) for i in range(32)]
    groups = [set(hidden[i : i + 8]) for i in range(0, 32, 8)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) > 1
    masks = {tuple(samples[i]["latent_mask"][0].tolist()) for i in range(8)}
    assert len(masks) > 1 or hidden[0] == NUM_LATENTS


@pytest.mark.parametrize("mask_ratio_group", [1, 2])
def test_mask_ratios_are_above_their_bound(processor, mask_ratio_group):
    samples = make_samples(processor, 60, task_weights=(1, 0, 1), mask_ratio_group=mask_ratio_group)
    samples.maker.mask_ratio_min = 0.9
    hidden = {int(samples[number]["latent_mask"].sum()) for number in range(60)}
    assert hidden == {15, 16}  # of 16


def test_bad_rows_are_replaced_and_told(processor):
    rows = make_rows()
    rows[1]["image"] = b"broken"
    rows[2]["captions"], rows[2]["questions"], rows[2]["answers"] = [], [], []
    samples = make_samples(processor, 60, rows)
    skipped = [entry for i in range(60) for entry in samples[i]["skipped"]]
    assert {(name, row) for name, row, _ in skipped} == {("list", 1), ("list", 2)}
    assert any("must have a caption" in reason for _, _, reason in skipped)
    same(samples[7], make_samples(processor, 60, rows)[7])
    for row in rows:
        row["image"] = b"broken"
    with pytest.raises(ValueError, match="100"):
        make_samples(processor, 60, rows)[0]


def test_a_broken_row_is_not_tried_again(processor):
    good, broken = make_rows()[:1], {**make_rows()[1], "image": b"broken"}
    samples = make_samples(processor, 40, [*good, broken, broken])
    tried = [[row for _, row, _ in samples[number]["skipped"]] for number in range(40)]
    replaced = [rows for rows in tried if rows]
    assert len(replaced) > 20 and all(rows[:2] in ([1], [2], [1, 2], [2, 1]) for rows in replaced)
    # Of two rows the other one is taken at once.
    samples = make_samples(processor, 40, [*good, broken])
    assert {len(samples[number]["skipped"]) for number in range(40)} == {0, 1}


JUNK_EXIF = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x12"


def png_bytes(kind="PNG", **kwargs):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind, **kwargs)
    return buffer.getvalue()


def add_member(tar, name, content, **pax_headers):
    member = tarfile.TarInfo(name)
    member.size, member.pax_headers = len(content), pax_headers
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("given", ["bytes", "PIL", "path"])
def test_junk_metadata_makes_no_bad_row(processor, maker, tmp_path, kind, given):
    content = png_bytes(kind, exif=JUNK_EXIF)
    (tmp_path / "a").write_bytes(content)
    for image in {"bytes": [content], "PIL": [Image.open(io.BytesIO(content))], "path": [str(tmp_path / "a")]}[given]:
        sample = maker({"image": image, "captions": ["a red square"]}, "t2i", seeded(0))
        assert sample["pixel_values"].shape == (1, 3, 8, 8)


def test_no_row_of_a_file_ends_a_training(processor, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_bytes())
    good = json.dumps({"image": "a.png", "captions": ["a red square"]})
    deep = '{"image": "a.png", "captions": ' + "[" * 10**5 + "]" * 10**5 + "}"
    (tmp_path / "rows.jsonl").write_text("\n".join([good, deep, good]))
    monkeypatch.setattr(sources, "MAX_SAMPLE_BYTES", 2**20)
    with tarfile.open(tmp_path / "rows.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (image, headers) in enumerate(
            [
                (png_bytes(), {}),
                (png_bytes(), {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10**13)}),  # unpacks to 10 TB
                (bytes(2**21), {}),
                (png_bytes(), {}),
            ]
        ):
            add_member(tar, f"{number}.png", image, **headers)
            add_member(tar, f"{number}.txt", b"a red square")
    for name, broken in (("rows.jsonl", {1}), ("rows.tar", {1, 2})):
        rows = sources.open_source(tmp_path / name)
        samples = make_samples(processor, 40, rows, task_weights=(1, 0, 0))
        skipped = [entry for number in range(40) for entry in samples[number]["skipped"]]
        assert {row for _, row, _ in skipped} == broken
        assert all(len(reason) < 1000 for _, _, reason in skipped)
    unreadable = [row for row in sources.open_stream(tmp_path / "rows.tar") if "unreadable" in row]
    assert len(unreadable) == 2


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), OverflowError("too large"), KeyError(1)])
def test_whatever_a_decoder_raises_is_a_bad_row(processor, maker, monkeypatch, error):
    row = make_rows()[0]
    good = maker(row, "t2i", seeded(0))

    def broken(*args, **kwargs):
        raise error

    for place in ("mmar.processors.image_processing_mmar.Image.open", "mmar.training.samples.open_pictures"):
        with monkeypatch.context() as patched:
            patched.setattr(place, broken)
            with pytest.raises(BadRow):
                maker(row, "t2i", seeded(0))
    same(maker(row, "t2i", seeded(0)), good)


def test_a_lost_source_ends_a_training(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png_bytes())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "captions": ["a red square"]}) + "\n")
    samples = make_samples(processor, 4, sources.open_source(tmp_path / "rows.jsonl"), task_weights=(1, 0, 0))
    assert not samples[0]["skipped"]
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="rows.jsonl") as failure:
        samples[1]
    assert not isinstance(failure.value, BadRow)


@pytest.mark.parametrize("streaming", [False, True])
def test_reports_call_a_source_by_its_name(processor, maker, tmp_path, streaming):
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in make_rows()]
    rows[1]["image"]["bytes"] = b"broken"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arguments = [SourceArguments(str(tmp_path / "rows.parquet"), "squares")]
    data = DataArguments("model", "data", task_weights=[0, 0, 1], shuffle_buffer=1)
    args = SimpleNamespace(train_batch_size=1, gradient_accumulation_steps=1, world_size=1, process_index=0)
    args.max_steps, args.seed, args.data_seed = 8, 0, None
    if streaming:
        samples = islice(streamed_samples(arguments, maker, data, args), 8)
    else:
        sources = [open_training_source(source, None) for source in arguments]
        samples = map(training_samples(sources, arguments, maker, data, args).__getitem__, range(8))
    assert {name for sample in samples for name, _, _ in sample["skipped"]} == {"squares"}


def test_sorting_stays_within_a_step(processor):
    samples = make_samples(processor, 30)
    numbers = list(StepSampler(samples, 12, sort_by_length=True))
    assert [sorted(numbers[i : i + 12]) for i in (0, 12, 24)] == [
        list(range(12)),
        list(range(12, 24)),
        list(range(24, 30)),
    ]
    lengths = [len(samples[number]["input_ids"]) for number in numbers]
    assert lengths == [length for i in (0, 12, 24) for length in sorted(lengths[i : i + 12], reverse=True)]
    assert numbers != list(range(30)) and list(StepSampler(samples, 12, False)) == list(range(30))
    # What a resumed training skips is not looked up.
    assert list(StepSampler(samples, 12, True, num_done=24))[:24] == list(range(24))
    assert list(StepSampler(samples, 12, True, num_done=24))[24:] == numbers[24:]


# The collator


def test_collated_batches(processor, maker):
    rows = make_rows()
    samples = [maker(row, task, seeded(0)) for row, task in zip(rows, ("t2i", "i2t", "uncond", "i2t"), strict=True)]
    batch = MMARDataCollator(processor, NUM_LATENTS)(samples)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values", "latent_mask"}
    assert (batch["attention_mask"].diff(dim=-1) >= 0).all()  # padding is on the left
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
    for i, sample in enumerate(samples):
        assert batch["input_ids"][i, -len(sample["input_ids"]) :].tolist() == sample["input_ids"]
        assert batch["labels"][i, -len(sample["labels"]) :].tolist() == sample["labels"]
        assert torch.equal(batch["pixel_values"][i], sample["pixel_values"][0])
    more = MMARDataCollator(processor, NUM_LATENTS, for_trainer=True)(samples)
    assert more["picture_tasks"].tolist() == [0, 1, 2, 1]
    assert more["seeds"].tolist() == [sample["seeds"][0] for sample in samples]
    # A worker stands behind the last sample of its batch.
    placed = [{**sample, "position": (0, {"num_samples": number})} for number, sample in enumerate(samples, start=1)]
    collator = MMARDataCollator(processor, NUM_LATENTS, for_trainer=True)
    assert collator(placed)["position"] == (0, {"num_samples": 4})


def test_rows_become_samples_of_random_tasks(processor):
    torch.manual_seed(0)
    batch = MMARDataCollator(processor, NUM_LATENTS)(make_rows() * 250)
    understanding = (batch["labels"] != IGNORE_INDEX).any(-1).float().mean().item()
    # 1000 draws: three standard deviations of a share of 0.45 are 0.047.
    assert abs(understanding - 0.45) < 0.047
    torch.manual_seed(0)
    assert torch.equal(MMARDataCollator(processor, NUM_LATENTS)(make_rows() * 250)["labels"], batch["labels"])


def test_what_the_collator_refuses(processor, maker):
    sample = maker(make_rows()[0], "t2i", seeded(0))
    latents = {name: value for name, value in sample.items() if name != "pixel_values"}
    latents["latent_distributions"] = torch.zeros(1, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="latents"):
        MMARDataCollator(processor, NUM_LATENTS)([sample, latents])
    with pytest.raises(ValueError, match="`task_weights`"):
        MMARDataCollator(processor, NUM_LATENTS, (1, 0))


# Streams


def stream_of(num_rows, num_shards):
    def rows(shards):
        for shard in shards:
            for index in range(shard, num_rows, num_shards):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (index, 0, 0)).save(buffer, "PNG")
                yield {"image": buffer.getvalue(), "captions": ["a red square"], "id": index}

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(num_shards))})


class Recorder(SampleMaker):
    """Notes the row's id in its sample."""

    def __call__(self, row, task, generator, *args):
        if row["id"] % 7 == 3:
            raise BadRow("an unlucky number")
        return {**super().__call__(row, task, generator, *args), "id": row["id"]}


def streamed(processor, num_shards, rank=0, world_size=1, positions=None, num_rows=24, buffer_size=1):
    maker = Recorder(processor, NUM_LATENTS, 0.5)
    streams = [stream_of(num_rows, num_shards), stream_of(num_rows, num_shards)]
    weights, tasks = [3.0, 1.0], [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]
    return StreamedSamples(streams, maker, weights, tasks, 0, rank, world_size, buffer_size, positions)


@pytest.mark.parametrize(("num_shards", "world_size", "num_workers"), [(4, 2, 2), (4, 1, 0), (3, 2, 0), (2, 2, 3)])
def test_streams_give_each_row_once_a_pass(processor, num_shards, world_size, num_workers):
    one_pass = []
    for rank in range(world_size):
        maker = Recorder(processor, NUM_LATENTS, 0.5)
        stream = StreamedSamples([stream_of(24, num_shards)], maker, [1.0], [[0, 1, 0]], 0, rank, world_size)
        loader = DataLoader(stream, batch_size=1, num_workers=num_workers, collate_fn=lambda samples: samples[0])
        for sample in loader:
            worker, position = sample["position"]
            if all(place[0] > 0 for place in position["places"]):
                break
            one_pass += [sample["id"], *(row for _, row, _ in sample["skipped"])]
    # Workers reach the second pass one by one: what they all read before is a part of the pass, each row once.
    assert len(one_pass) == len(set(one_pass)) and set(one_pass) <= set(range(24))
    if num_workers == 0:
        assert len(one_pass) >= 24 - 2 * world_size


def test_ranks_and_workers_of_a_stream_have_random_numbers_of_their_own(processor):
    seeds = []
    for rank in range(2):
        loader = DataLoader(streamed(processor, 4, rank, 2), 1, num_workers=2, collate_fn=lambda samples: samples[0])
        seeds += [seed for sample in islice(loader, 8) for seed in sample["seeds"]]
    assert len(set(seeds)) == len(seeds) == 16


def test_streams_go_on_where_they_stood(processor):
    def run(positions=None, count=60):
        loader = DataLoader(
            streamed(processor, 4, positions=positions, buffer_size=5),
            batch_size=2,
            num_workers=2,
            collate_fn=list,
        )
        batches = []
        for batch in loader:
            batches.append(batch)
            if len(batches) == count:
                return batches

    whole = run()
    seen = whole[:21]
    positions = {batch[-1]["position"][0]: batch[-1]["position"][1] for batch in seen}
    assert json.loads(json.dumps(positions)) == {str(worker): place for worker, place in positions.items()}
    resumed = {}
    for batch in run(positions, 30):
        resumed.setdefault(batch[-1]["position"][0], []).append([sample["id"] for sample in batch])
    expected = {}
    for batch in whole[21:]:
        expected.setdefault(batch[-1]["position"][0], []).append([sample["id"] for sample in batch])
    for worker in (0, 1):
        assert resumed[worker][:12] == expected[worker][:12]
    with pytest.raises(ValueError, match="workers"):
        next(iter(streamed(processor, 4, positions=positions)))


def test_another_worker_in_another_pass_changes_no_order(processor, monkeypatch):
    """`datasets` keeps a stream's epoch in memory that all workers share; here the other one comes in between."""
    samples = streamed(processor, 4, buffer_size=5)

    def first_rows(passes):
        rows = samples._rows(0, passes, 0)
        return [next(rows)[0]["id"] for _ in range(8)]

    expected = [first_rows(passes) for passes in range(3)]
    assert len({tuple(ids) for ids in expected}) == 3
    begin, others = datasets.IterableDataset.__iter__, [7, 8, 9]

    def begin_late(stream):
        if others:
            next(samples._rows(0, others.pop(), 0))
        return begin(stream)

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", begin_late)
    assert [first_rows(passes) for passes in range(3)] == expected


def test_streams_are_mixed_in_exact_proportions(processor):
    stream = iter(streamed(processor, 2))
    samples = [next(stream) for _ in range(BLOCK)]
    assert [sample["number"] for sample in samples] == list(range(BLOCK))
    assert sum(sample["task"] == TASKS.index("t2i") for sample in samples) == pytest.approx(375, abs=20)
    # 750 and 250 samples of passes of 24 rows, 3 of them unlucky.
    assert [passes for passes, _ in samples[-1]["position"][1]["places"]] == [750 // 21, 250 // 21]


# Nothing in one row ends a training


def deep_list(depth=5000):
    value = []
    for _ in range(depth):
        value = [value]
    return value


BAD_ROWS = {
    "half a character": {"captions": ["\ud800"], "questions": ["\ud800"], "answers": ["a"]},
    "memory": {"image": b"memory"},
    "recursion": {"image": b"recursion"},
    "deep captions": {"captions": deep_list(), "questions": deep_list(), "answers": deep_list()},
    "deep chat": {"messages": [{"role": "user", "content": deep_list()}]},
    "numbers": {"captions": [5], "questions": [5], "answers": [5]},
    "no list": {"image": None, "images": 5},
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("streaming", [False, True])
def test_whatever_goes_wrong_in_a_row_is_a_bad_row(processor, monkeypatch, bad, streaming):
    def open_pictures(row):
        if row.get("image") in (b"memory", b"recursion"):
            raise MemoryError if row["image"] == b"memory" else RecursionError
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr("mmar.training.samples.open_pictures", open_pictures)
    good = {"captions": ["a red square"], "questions": ["What?"], "answers": ["a red square"]}
    rows = [
        {"image": b"p", **good, "id": "good"},
        {"image": b"p", **good, **BAD_ROWS[bad], "id": {"a": [b"?" * 10**6]}},
    ]
    maker = SampleMaker(processor, NUM_LATENTS, 0.5)
    if streaming:

        class Stream(list):
            def shuffle(self, **options):
                return self

        monkeypatch.setattr("mmar.training.samples.split_dataset_by_node", lambda stream, *args: stream)
        samples = list(islice(StreamedSamples([Stream(rows)], maker, [1.0], [[1, 1, 1]], 0), 20))
    else:
        made = make_samples(processor, 20, rows, task_weights=(1, 1, 1))
        samples = [made[number] for number in range(20)]
    skipped = [entry for sample in samples for entry in sample["skipped"]]
    assert skipped and len(json.dumps(skipped)) < 1500 * len(skipped)
    if not streaming:
        assert {row for _, row, _ in skipped} == {1}
        assert all(made.length(number) >= 0 for number in range(20))
