"""Tables of texts and labels, and batches of them."""

import json

import numpy as np
import pytest

from llmkern.errors import UserError
from llmkern.text import CharTokenizer
from llmkern.text.labelled import (
    ExampleBatches,
    Examples,
    encode_rows,
    find_labels,
    hold_out,
    read_table,
)

ROWS = [("one, two", "b"), ('she said "no"\nand left', "a"), ("drei", "b"), ("vier", "10")]


def _write(folder, suffix):
    path = folder / f"data{suffix}"
    if suffix in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if suffix == ".csv" else "\t").writerows(
                [("text", "label"), *ROWS]
            )
    elif suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps({"text": t, "label": y, "id": 3}) for t, y in ROWS))
    else:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        columns = list(zip(*ROWS))
        write_table(arrow.table({"text": columns[0], "label": columns[1]}), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_read(tmp_path, suffix):
    rows = read_table(_write(tmp_path, suffix))
    assert [(row.text, row.label) for row in rows] == ROWS
    assert len({row.where for row in rows}) == 4


def test_numbers_become_labels(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"t": "a", "y": y}) for y in (10, 9, True, 9)))
    rows = read_table(path, "t", "y")
    assert [row.label for row in rows] == ["10", "9", "True", "9"]
    assert find_labels(rows) == ("10", "9", "True")
    assert find_labels(rows[:2]) == ("9", "10")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.csv", "", "has no rows"),
        ("x.csv", "text,label\n", "has no rows"),
        ("x.csv", "text,y\na,b\n", r"x\.csv:2 has no column 'label' \(it has text, y\); name it with"),
        ("x.csv", "text,label\na,\n", r"x\.csv:2 has nothing in its column 'label'"),
        ("x.csv", "text,label\na\n", r"x\.csv:2 has nothing in its column 'label'"),
        ("x.csv", "text,label\na,b,c\n", r"x\.csv:2 has more columns than the first line"),
        ("x.csv", 'text,label\n"a,b\n', r"x\.csv:\d is not CSV"),
        ("x.jsonl", '{"text": "a", "label": ["b"]}', "has a list in its column 'label'"),
        ("x.jsonl", '{"text": " ", "label": "b"}', r"x\.jsonl:1 has nothing in its column 'text'"),
        ("x.jsonl", "[1]", r"x\.jsonl:1 is a JSON list"),
        ("x.jsonl", '\n{"text"', r"x\.jsonl:2 is not JSON"),
        ("x.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("x.parquet", b"PAR1nothing", "is not Parquet"),
        ("x.xlsx", "", "is not known as a table, expected one of .csv"),
    ],
)
def test_bad_tables(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=match) as error:
        read_table(path)
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "x.csv")


def _examples(lengths, classes):
    return Examples([np.arange(n) for n in lengths], np.array(classes))


def test_encode(tmp_path):
    rows = read_table(_write(tmp_path, ".csv"))
    tokenizer = CharTokenizer("".join(text for text, _ in ROWS))
    examples = encode_rows(rows, ("10", "a", "b"), tokenizer, max_tokens=8)
    assert examples.classes.tolist() == [2, 1, 2, 0] and examples.cut == 1
    assert tokenizer.decode(examples.tokens[1]) == "she said"
    with pytest.raises(UserError, match=r"data\.csv:2 has the label 'b', expected one of 10, a"):
        encode_rows(rows, ("10", "a"), tokenizer, 8)
    with pytest.raises(UserError, match=r"data\.csv:2: character 'o' at position 0 is not in"):
        encode_rows(rows, ("10", "a", "b"), CharTokenizer("x"), 8)
    with pytest.raises(UserError, match="all 1 rows have the label 'b', expected at least 2"):
        find_labels(rows[:1])


def test_padding():
    tokens, classes = _examples([3, 1, 2], [0, 1, 0]).batch([0, 1])
    assert tokens.tolist() == [[0, 1, 2], [0, -1, -1]] and classes.tolist() == [0, 1]


def test_hold_out():
    examples = _examples(range(1, 101), [0] * 80 + [1] * 18 + [2] * 2)
    train, held_out = hold_out(examples, "abc", 0.25, seed=1)
    assert np.bincount(held_out.classes).tolist() == [20, 4, 1]
    lengths = sorted(len(t) for part in (train, held_out) for t in part.tokens)
    assert lengths == list(range(1, 101))
    again = hold_out(examples, "abc", 0.25, seed=1)[1]
    assert [len(t) for t in again.tokens] == [len(t) for t in held_out.tokens]
    with pytest.raises(UserError, match="label 'b' has 1 text, expected at least 2"):
        hold_out(_examples([1, 1, 1], [0, 0, 1]), "ab", 0.5)


def test_batches():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 60, size=203).tolist()
    examples = _examples(lengths, list(range(203)))
    batches = ExampleBatches(examples, 8, seed=3)
    assert batches.epoch_steps == 26
    epochs = []
    for epoch in range(2):
        seen = [batches[epoch * 26 + i] for i in range(26)]
        epochs.append([classes.tolist() for _, classes in seen])
        assert sorted(c for classes in epochs[-1] for c in classes) == list(range(203))
        padding = sum((tokens == -1).sum().item() for tokens, _ in seen)
        assert padding < 0.15 * sum(lengths)
    assert epochs[0] != epochs[1]
    assert ExampleBatches(examples, 8, seed=3)[30][1].tolist() == epochs[1][4]
