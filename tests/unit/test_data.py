import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_config, tiny_model
from PIL import Image
from squares import make_processor, make_rows

from mmar.modeling_mmar.configuration_mmar import IGNORE_INDEX
from mmar.training.data import MMARDataCollator, MMARLatentDataset, distort, read_rows


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
    # Batches of other sizes round differently.
    torch.testing.assert_close(dataset.means[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert dataset.means.shape == (4, 3, 4, 4, 4)
    torch.manual_seed(0)
    batch = collate(processor, (1.0, 0.0, 0.0), [dataset[i] for i in range(4)])
    deviation = (batch["latents"] - expected).abs() / dataset.stds[:, 0]
    assert 0.1 < deviation.mean() < 1.5  # E|normal| = 0.8: the posterior is sampled
    assert "pixel_values" not in batch


def test_distort_keeps_size_and_white_background():
    torch.manual_seed(0)
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste("red", (12, 12, 20, 20))
    moved = distort(picture)
    assert moved.size == (32, 32)
    assert moved.getpixel((0, 0)) == (255, 255, 255)
    assert moved.tobytes() != picture.tobytes()


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
    ],
)
def test_read_rows_refuses_bad_rows(tmp_path, column, value, message):
    rows = make_rows()
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


def test_read_rows_refuses_an_empty_file(tmp_path):
    table = pa.table({"image": [], "captions": [], "questions": [], "answers": []})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="at least one row"):
        read_rows(tmp_path / "a.parquet")
