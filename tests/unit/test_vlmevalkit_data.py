"""VLMEvalKit's questions, messages and tables, and answers that survive a kill: without the kit."""

import base64
import json
import math

import pytest

from mmar.evaluation.vlmevalkit_data import (
    MCQ_INSTRUCTION,
    MCQ_INSTRUCTION_CN,
    AnswersSoFar,
    chat_content,
    question_message,
    question_text,
    read_table,
    table_type,
)


def test_questions_ask_for_a_direct_answer():
    options = {"question": "Which?", "A": "red", "B": "1.5", "C": math.nan, "D": "", "hint": math.nan}
    assert question_text(options) == f"Which?\nA. red\nB. 1.5\n{MCQ_INSTRUCTION}"
    assert question_text({**options, "hint": "Look."}).startswith("Look.\nWhich?\nA. red")
    assert question_text({**options, "question": "哪个?"}).endswith(f"B. 1.5\n{MCQ_INSTRUCTION_CN}")
    assert question_text({"question": "Is it red?"}, is_yes_no=True) == "Is it red?\nPlease answer yes or no."
    asked = "Is it red? Please answer yes or no."
    assert question_text({"question": asked}, is_yes_no=True) == asked
    # A column A alone is no multiple choice.
    assert question_text({"question": "What is it?", "A": "x"}) == "What is it?"


def test_pictures_stand_where_the_text_says():
    pictures = ["a.png", "b.png"]
    before = question_message("Which?", pictures)
    assert [item["value"] for item in before] == ["a.png", "b.png", "Which?"]
    placed = question_message("See <image 2> and <image 1>?", pictures)
    assert [item["value"] for item in placed] == ["See ", "b.png", " and ", "a.png", "?"]
    assert [item["type"] for item in placed] == ["text", "image", "text", "image", "text"]
    # A place without its picture is text.
    assert question_message("See <image 3>", pictures)[-1] == {"type": "text", "value": "See <image 3>"}


def test_messages_become_content_or_are_refused(tmp_path):
    picture = tmp_path / "kit" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"x")
    message = [{"type": "image", "value": str(picture)}, {"type": "text", "value": "What?"}]
    expected = [{"type": "image", "image": b"x"}, {"type": "text", "text": "What?"}]
    assert chat_content(message, [tmp_path / "other", picture.parent]) == expected
    data = [{"type": "image", "value": f"{head}eHh4"} for head in ("data:image/png;base64,", "")]
    assert chat_content(data) == [{"type": "image", "image": b"xxx"}] * 2
    for empty in ([], [{"type": "text", "value": " \n"}]):
        with pytest.raises(ValueError, match="empty"):
            chat_content(empty)
    with pytest.raises(ValueError, match="'video'"):
        chat_content([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(ValueError, match="'text'"):
        chat_content([{"type": "text", "value": math.nan}])


def test_a_row_names_no_file_but_the_kits_own(tmp_path):
    # With a dot: a path without one may be base64 as well.
    kit, other = tmp_path / "kit.data", tmp_path / "other.png"
    kit.mkdir()
    other.write_bytes(b"x")
    (kit / "link.png").symlink_to(other)
    places = [str(other), other.as_uri(), str(kit / ".." / "other.png"), str(kit / "link.png"), str(kit / "none.png")]
    for place in [*places, str(kit), "http://127.0.0.1:9/a.png", "/dev/zero", "a\0.png"]:
        with pytest.raises(ValueError, match="image"):
            chat_content([{"type": "image", "value": place}], [kit])
    with pytest.raises(ValueError, match="image"):
        chat_content([{"type": "image", "value": str(other)}])


PICTURE = base64.b64encode(bytes(range(120))).decode()


def write(path, *rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tables_are_checked(tmp_path):
    path = tmp_path / "table.tsv"
    header = ("index", "image", "question", "answer")
    rows = read_table(write(path, header, ("0", PICTURE, "Is it?", "Yes"), ("1", "0", "Is it?", "No")))
    assert [row["answer"] for row in rows] == ["Yes", "No"] and table_type(rows, "t") == "Y/N"
    wrong = {
        "without index and question": [("image", "answer"), (PICTURE, "Yes")],
        "without question": [("index", "image"), ("0", PICTURE)],
        "got 0 rows": [header],
        "got '0' again in row 1": [header, ("0", PICTURE, "?", "No"), ("0", PICTURE, "?", "No")],
        "row 1 has '7'. Put the picture there": [header, ("0", PICTURE, "?", "No"), ("1", "7", "?", "No")],
    }
    for message, lines in wrong.items():
        with pytest.raises(ValueError, match=message):
            read_table(write(path, *lines))
    with pytest.raises(ValueError, match="none.tsv"):
        read_table(tmp_path / "none.tsv")
    path.write_bytes(b"index\tquestion\n0\t\xff\n")
    with pytest.raises(ValueError, match="UTF-8"):
        read_table(path)


def test_kind_of_table():
    assert table_type([{"A": "x", "B": "y", "answer": "A"}], "t") == "MCQ"
    assert table_type([{"answer": "Yes"}, {"answer": "maybe"}], "t") is None
    assert table_type([{}], "t") is None
    # The kit compares "Yes" with "yes" and finds them different.
    with pytest.raises(ValueError, match="Yes, no"):
        table_type([{"answer": "Yes"}, {"answer": "no"}], "t")


def test_a_killed_run_loses_nothing(tmp_path):
    path, run = tmp_path / "run" / "answers.jsonl", {"model": "m1", "options": {"do_sample": "False"}}
    answers = AnswersSoFar(path, run)
    answers.add({"0": "a\nb", "1": "\u00e9"})
    answers.add({"2": ""})
    # Killed in the middle of a line.
    with path.open("ab") as file:
        file.write('{"index": "3", "answer": "\u00e9'.encode()[:-1])
    again = AnswersSoFar(path, run)
    assert again.answers == {"0": "a\nb", "1": "\u00e9", "2": ""}
    again.add({"3": "c"})
    assert AnswersSoFar(path, run).answers == {**answers.answers, "3": "c"}
    assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    with pytest.raises(ValueError, match="answers.jsonl"):
        AnswersSoFar(path, {**run, "model": "m2"})
    # Killed before the first line was whole.
    path.write_bytes(b'{"run"')
    assert AnswersSoFar(path, run).answers == {}
    assert path.read_text() == json.dumps({"run": run}) + "\n"


@pytest.mark.parametrize("line", ["x", "{}", "[1]", "\0\0", '{"index": "0"}'])
def test_answers_that_are_none(tmp_path, line):
    """After a failing disk, or of another program."""
    path, run = tmp_path / "answers.jsonl", {"model": "m1"}
    for lines in ((line,), (json.dumps({"run": run}), line)):
        text = "".join(f"{each}\n" for each in (*lines, '{"index'))
        path.write_text(text)
        with pytest.raises(ValueError, match="answers.jsonl"):
            AnswersSoFar(path, run)
        assert path.read_text() == text


def test_table_with_a_byte_order_mark(tmp_path):
    """As spreadsheets write it; the kit reads it too."""
    path = tmp_path / "table.tsv"
    path.write_text("index\tquestion\n7\tIs it?\n", encoding="utf-8-sig")
    assert read_table(path) == [{"index": "7", "question": "Is it?"}]
