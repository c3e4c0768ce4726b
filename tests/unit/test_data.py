import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_config, tiny_model
from PIL import Image
from squares import make_processor, make_rows

from mmar.modeling_mmar.configuration_mmar import IGNORE_INDEX
from mmar.training.data import MMARDataCollator, MMARLatentDataset, read_rows


@pytest.fixture
def processor():
    return make_processor()


def collate(processor, weights, rows=None):
    return MMARDataCollator(processor, tiny_config().num_latents, weights, mask_ratio_min=0.5)(rows or make_rows())


def text_of(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_text_to_image_hides_latents_and_has_no_labels(processor):
    torch.manual_seed(0)
    batch = collate(processor, (1.0, 0.0, 0.0))
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert (batch["latent_mask"].sum(-1) >= 8).all()  # a ratio of at least 0.5 of 16
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [16] * 4
    assert "a red square" in text_of(processor, batch["input_ids"][0]) or "red square" in text_of(
        processor, batch["input_ids"][0]
    )


def test_image_to_text_hides_nothing_and_labels_only_the_answer(processor):
    torch.manual_seed(0)
    batch = collate(processor, (0.0, 1.0, 0.0))
    assert not batch["latent_mask"].any()
    for row, ids, labels in zip(make_rows(), batch["input_ids"], batch["labels"], strict=True):
        labelled = labels != IGNORE_INDEX
        assert torch.equal(labels[labelled], ids[labelled])
        assert text_of(processor, ids[labelled]).removesuffix("<|im_end|>") in row["answers"]


def test_unconditional_has_the_null_prompt(processor):
    batch = collate(processor, (0.0, 0.0, 1.0))
    null = processor.generation_inputs([None])["input_ids"][0]
    expected = torch.cat([null, torch.full((16,), processor.image_token_id)])
    assert torch.equal(batch["input_ids"], expected.expand(4, -1))
    assert batch["latent_mask"].any(-1).all()


def test_padding_is_on_the_left(processor):
    torch.manual_seed(0)
    batch = collate(processor, (0.5, 0.5, 0.0), make_rows() * 4)
    assert (batch["attention_mask"].diff(dim=-1) >= 0).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_task_weights_are_the_shares(processor):
    torch.manual_seed(0)
    batch = collate(processor, (0.5, 0.45, 0.05), make_rows() * 250)
    understanding = (batch["labels"] != IGNORE_INDEX).any(-1).float().mean().item()
    # 1000 draws: three standard deviations of a share of 0.45 are 0.047.
    assert abs(understanding - 0.45) < 0.047


def test_cached_latents_are_those_of_the_model(processor):
    model = tiny_model()
    rows = make_rows()
    dataset = MMARLatentDataset(rows, model, processor, num_copies=2, batch_size=3)
    pixel_values = processor.image_processor([Image.open(io.BytesIO(r["image"])) for r in rows], return_tensors="pt")
    expected = model.encode_images(pixel_values["pixel_values"])
    assert dataset.latents.keys() == {"picture"}
    assert dataset.latents["picture"].shape == (4, 3, 2, 4, 4, 4)
    mean, std = dataset.latents["picture"][:, 0].float().unbind(1)
    # Kept in half precision.
    torch.testing.assert_close(mean, expected, atol=1e-3, rtol=1e-3)
    torch.manual_seed(0)
    batch = collate(processor, (1.0, 0.0, 0.0), [dataset[i] for i in range(4)])
    deviation = (batch["latents"] - expected).abs() / std
    assert 0.1 < deviation.mean() < 1.5  # E|normal| = 0.8: the posterior is sampled
    assert "pixel_values" not in batch


def styled_rows():
    """The four squares, red or blue, with answers of each kind: rows 0 and 1 are of one style, 2 and 3 of another."""
    rows = make_rows()
    for index, row in enumerate(rows):
        style = "flat" if index < 2 else "bold"
        row["questions"] = ["Describe.", "What?", "Which style?"]
        row["answers"] = [f"a {row['answers'][0]} thing in {style}", row["answers"][0], style]
        row["depends_on"] = ["picture", "content", "style"]
        row["swaps"] = [row["answers"][1], None, None]
    return rows


def test_each_answer_is_shown_its_kind_of_views(processor):
    dataset = MMARLatentDataset(styled_rows(), tiny_model(), processor, num_copies=3)
    assert {kind: len(bank[0]) for kind, bank in dataset.latents.items()} == {"picture": 4, "content": 3, "style": 3}
    rows = [dataset[i] for i in range(4)] * 8
    for number, kind in enumerate(("picture", "content", "style"), start=1):
        for row in rows:
            row["latents"] = {**row["latents"], kind: torch.full_like(dataset.latents[kind][0], number)}
    for row in rows:
        row["latents"] = {kind: torch.stack([bank[:, 0], 0 * bank[:, 1]], 1) for kind, bank in row["latents"].items()}
    torch.manual_seed(0)
    batch = collate(processor, (0.0, 1.0, 0.0), rows)
    seen = set()
    for row, labels, latents in zip(rows, batch["labels"], batch["latents"], strict=True):
        answer = text_of(processor, labels[labels != IGNORE_INDEX]).removesuffix("<|im_end|>")
        pair = row["answers"].index(answer)
        seen.add(pair)
        assert (latents == pair + 1).all()
    assert seen == {0, 1, 2}


def test_swapped_answers_teach_only_what_follows(processor):
    rows = MMARLatentDataset(styled_rows(), tiny_model(), processor)
    rows = [{**rows[i], "questions": ["Describe."]} for i in range(4)]
    collator = MMARDataCollator(processor, 16, (0.0, 1.0, 0.0), swap_rate=1.0)
    torch.manual_seed(0)
    batch = collator(rows * 40)
    contents = set()
    for row, ids, labels in zip(rows * 40, batch["input_ids"], batch["labels"], strict=True):
        style = row["answers"][2]
        learned = labels != IGNORE_INDEX
        assert torch.equal(labels[learned], ids[learned])
        assert text_of(processor, ids[learned]) == f" thing in {style}<|im_end|>"
        written = text_of(processor, ids).split("assistant\n")[1]
        contents.add((row["swaps"][0], written.split()[1]))
    # Any name stands before any picture's style, its own too.
    names = {row["swaps"][0] for row in rows}
    assert contents == {(own, other) for own in names for other in names}
    # With its own name a row teaches up to the name.
    collator.swap_rate = 1e-9
    for row, labels in zip(rows, collator(rows)["labels"], strict=True):
        assert text_of(processor, labels[labels != IGNORE_INDEX]) == f"a {row['swaps'][0]}"
    collator.swap_rate = 0.0
    for row, labels in zip(rows, collator(rows)["labels"], strict=True):
        assert text_of(processor, labels[labels != IGNORE_INDEX]) == row["answers"][0] + "<|im_end|>"
    with pytest.raises(ValueError, match="`swap_rate` must be in \\[0, 1\\]; got 2"):
        MMARDataCollator(processor, 16, swap_rate=2)


def test_read_rows_names_missing_columns(tmp_path):
    pq.write_table(pa.table({"captions": [["a"]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="missing: answers, image, questions"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("captions", [], "row 1 of a.parquet must have `captions`, none of them empty; got \\[\\]"),
        ("captions", ["a", " "], "row 1 of a.parquet must have `captions`, none of them empty"),
        ("answers", ["red", None], "row 1 of a.parquet must have `answers`, none of them empty"),
        ("answers", ["red"], "one answer per question; got 2 questions and 1 answers"),
        ("captions", "a red square", "row 1 of a.parquet must have `captions` as a list of strings"),
        ("image", b"", "must hold its picture's file"),
        ("depends_on", ["picture", "mood"], "`depends_on` with, for each answer, one of picture, content, style"),
        ("depends_on", ["picture"], "`depends_on` with, for each answer, one of picture, content, style; got"),
        (
            "swaps",
            ["yellow", None],
            "`swaps` with, for each answer, a text that stands in it once, before a space, or null; got",
        ),
        ("swaps", ["e", None], "stands in it once"),
        ("swaps", [None, "square"], "stands in it once, before a space"),
        ("swaps", [5, None], "stands in it once"),
        (
            "swaps",
            ["", None],
            "`swaps` with, for each answer, a text that stands in it once, before a space, or null; got",
        ),
    ],
)
def test_read_rows_refuses_bad_rows(tmp_path, column, value, message):
    rows = [{column: None, **row} for row in make_rows()]
    rows[1][column] = value
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
    if column == "captions" and isinstance(value, str):
        rows = [{**row, "captions": value} for row in rows]
        message = message.replace("row 1", "row 0")  # a column has one type
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "a.parquet")


def test_texts_are_tried_before_training(processor):
    rows = make_rows()
    rows[2]["captions"] = ["a <image>"]
    with pytest.raises(ValueError, match="row 2: .* must not contain the image mark <image>"):
        MMARLatentDataset(rows, tiny_model(), processor)
    with pytest.raises(ValueError, match="at least one row .* got 0 rows"):
        MMARLatentDataset([], tiny_model(), processor)
    with pytest.raises(ValueError, match="`task_weights` must be one number per task"):
        MMARDataCollator(processor, 16, (1, 0))


def test_read_rows_refuses_what_is_no_parquet(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    for path, message in (
        ("none.parquet", "there is none at"),
        (".", "there is none at"),
        ("text.parquet", "be read"),
    ):
        with pytest.raises(ValueError, match=f"expected a parquet file.*{message}"):
            read_rows(tmp_path / path)


def test_read_rows_refuses_an_empty_file(tmp_path):
    table = pa.table({"image": [], "captions": [], "questions": [], "answers": []})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="at least one row"):
        read_rows(tmp_path / "a.parquet")
