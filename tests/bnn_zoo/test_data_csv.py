"""The user's own CSV: what is inferred, what is refused and how the message reads, and new rows for prediction."""

import numpy as np
import pandas as pd
import pytest
import torch

from bnn_zoo import data
from bnn_zoo.data.preprocessor import Column


def table(num_rows=40):
    """A table with a column of every kind: two numbers, a boolean, a category and a real target."""
    rng = np.random.default_rng(0)
    area = rng.normal(100, 20, num_rows).round(2)
    return pd.DataFrame({
        "area": area,
        "rooms": rng.integers(1, 6, num_rows),
        "garden": np.arange(num_rows) % 2 == 0,
        "city": np.array(["York", "Bath", "Ely"])[np.arange(num_rows) % 3],
        "price": (3 * area + rng.normal(0, 5, num_rows)).round(2),
    })


@pytest.fixture
def write(tmp_path):
    def writer(content, **options):
        path = tmp_path / "homes.csv"
        if isinstance(content, pd.DataFrame):
            content.to_csv(path, index=False, **options)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)
        return path

    return writer


def test_every_kind_of_column_becomes_named_inputs(write):
    loaded = data.load_csv(write(table()), "price", dtype=torch.float64)
    assert loaded.task == "regression"
    assert loaded.feature_names == ("area", "rooms", "garden", "city=Bath", "city=Ely", "city=York")
    assert loaded.x_train.shape == (36, 6)
    assert loaded.x_test.shape == (4, 6)
    assert (loaded.name, loaded.target_name, loaded.split) == ("homes", "price", "0")
    kinds = [column.kind for column in loaded.preprocessor.columns]
    assert kinds == ["number", "number", "boolean", "category"]


def test_the_rows_are_split_and_standardised_on_the_training_part(write):
    frame = table()
    loaded = data.load_csv(write(frame), "price", test_fraction=0.25, split=3, dtype=torch.float64)
    assert len(loaded.x_test) == 10
    torch.testing.assert_close(loaded.x_train.mean(0), torch.zeros(6), atol=1e-12, rtol=0)
    torch.testing.assert_close(loaded.x_train.std(0, correction=0), torch.ones(6), atol=1e-12, rtol=0)
    y_train, y_test = loaded.targets_original()
    assert sorted([*y_train.tolist(), *y_test.tolist()]) == pytest.approx(sorted(frame["price"]))
    areas = [*loaded.inputs_original(loaded.x_train)[:, 0], *loaded.inputs_original(loaded.x_test)[:, 0]]
    by_area = dict(zip(np.round(areas, 2).tolist(), [*y_train.tolist(), *y_test.tolist()], strict=True))
    assert by_area == pytest.approx(dict(zip(frame["area"], frame["price"], strict=True)))


def test_same_split_same_rows_and_other_split_other_rows(write):
    path = write(table())
    first, again, other = (data.load_csv(path, "price", split=split) for split in (1, 1, 2))
    assert torch.equal(first.x_test, again.x_test)
    assert not torch.equal(first.y_test, other.y_test)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_comma_semicolon_and_tab_are_read(write, separator):
    reference = data.load_csv(write(table()), "price")
    assert torch.equal(data.load_csv(write(table(), sep=separator), "price").x_train, reference.x_train)


def test_a_byte_order_mark_and_blanks_are_no_part_of_names(write):
    frame = table()
    text = frame.to_csv(index=False).replace(",", ", ")
    loaded = data.load_csv(write(b"\xef\xbb\xbf" + text.encode()), "price")
    assert loaded.feature_names[0] == "area"
    assert loaded.feature_names[-1] == "city=York"


def test_a_quoted_name_may_hold_a_separator_or_a_line_break(write):
    rows = "".join(f"{row},{row % 7},{row * 0.5}\n" for row in range(20))
    loaded = data.load_csv(write('"size, m2","rooms\nin all",price\n' + rows), "price")
    assert loaded.feature_names == ("size, m2", "rooms\nin all")


@pytest.mark.parametrize(
    ("values", "task", "names"),
    [
        (["yes", "no"], "classification", ("no", "yes")),
        ([True, False], "classification", ("False", "True")),
        ([3, 1, 2], "classification", ("1", "2", "3")),
        ([1.0, 0.0], "classification", ("0", "1")),
        ([0.5, 1.0, 2.0], "regression", ()),
        (list(range(11)), "regression", ()),
    ],
)
def test_the_task_is_inferred_from_the_target(write, values, task, names):
    frame = table()
    frame["price"] = [values[row % len(values)] for row in range(len(frame))]
    loaded = data.load_csv(write(frame), "price")
    assert loaded.task == task
    assert loaded.class_names == names
    assert loaded.num_classes == len(names)


def test_labels_follow_the_class_names_and_splits_keep_proportions(write):
    frame = table()
    frame["price"] = ["dear" if row % 4 == 0 else "cheap" for row in range(40)]
    loaded = data.load_csv(write(frame), "price", test_fraction=0.2)
    assert loaded.class_names == ("cheap", "dear")
    assert loaded.y_train.dtype == torch.int64
    assert (loaded.y_train.sum(), len(loaded.y_train)) == (8, 32)
    assert (loaded.y_test.sum(), len(loaded.y_test)) == (2, 8)
    assert (loaded.y_mean, loaded.y_std, loaded.nll_offset) == (0.0, 1.0, 0.0)
    assert torch.equal(loaded.to_original(loaded.y_test), loaded.y_test)


def test_a_class_with_one_row_stays_in_the_training_part(write):
    frame = table()
    frame["price"] = ["rare"] + ["common"] * 39
    loaded = data.load_csv(write(frame), "price", test_fraction=0.5)
    assert loaded.y_train.tolist().count(1) == 1
    assert 1 not in loaded.y_test.tolist()


def test_the_task_can_be_said(write):
    frame = table()
    frame["price"] = np.arange(40) % 3
    assert data.load_csv(write(frame), "price", task="regression").task == "regression"


def test_few_rows_still_give_one_test_row(write):
    loaded = data.load_csv(write(table(12)), "price", test_fraction=0.01)
    assert len(loaded.x_test) == 1


def with_column(name, values):
    frame = table()
    frame[name] = values
    return frame


def with_hole(*rows, column="area"):
    frame = table()
    frame.loc[list(rows), column] = np.nan
    return frame


REFUSED = {
    "unknown target": (table(), r"has no column 'prize': did you mean 'price'\? The columns are area, rooms", "prize"),
    "missing values": (
        with_hole(1, 4),
        r"missing or infinite values in 'area': 2 \(rows 2, 5\).*missing=\"drop\"",
        "price",
    ),
    "missing target": (with_hole(2, column="price"), r"'price': 1 \(row 3\)", "price"),
    "infinite value": (with_column("area", [np.inf] + [1.0, 2.0, 3.0] * 13), r"'area': 1 \(row 1\)", "price"),
    "constant column": (with_column("year", 2020), r"only one value: year\..*constant=\"drop\"", "price"),
    "empty column": (with_column("note", np.nan), "only one value: note", "price"),
    "dates": (
        with_column("built", [f"{1980 + row}-01-31" for row in range(40)]),
        r"column 'built' holds dates or times \(such as '1980-01-31'\)",
        "price",
    ),
    "identifier": (
        with_column("id", [f"home {row}" for row in range(40)]),
        r"column 'id' has 40 different texts in 40 rows .*`ignore`",
        "price",
    ),
    "numbers with text": (
        with_column("age", ["?", *map(str, range(39))]),
        r"column 'age' holds numbers, but row 1 has '\?'",
        "price",
    ),
    "one class": (with_column("price", "same"), "target 'price' has only one value", "price"),
    "one number": (with_column("price", 3.5), "target 'price' has only one value", "price"),
    "date target": (with_column("price", [f"{row % 28 + 1:02}/03/2020" for row in range(40)]), "holds dates", "price"),
    "too many classes": (
        with_column("price", [f"home {row}" for row in range(40)]),
        "40 different values in 40 rows, too many classes: choose another target",
        "price",
    ),
    "too few rows": (table(9), "at least 10 usable rows, got 9", "price"),
    "no features": (table()[["price"]], "at least one column beside the target 'price'", "price"),
    "no rows": (table(0), "has a header line but no rows", "price"),
    "empty file": ("", "is empty: expected a header line and rows", "price"),
    "duplicate names": ("a,b,a\n" + "1,2,3\n" * 20, "duplicate column names: a", "b"),
    "nameless column": (",b\n" + "1,2\n" * 20, "column 1 has no name", "b"),
    "no header": ("1,2.5\n" + "1,2\n" * 20, "expected column names in the first line, got numbers", "b"),
    "ragged rows": ("a,b\n1,2\n1,2,3\n" + "1,2\n" * 20, "equally long rows", "b"),
    "long rows": ("a,b\n" + "1,2,3\n" * 20, "equally long rows", "b"),
    "binary file": (b"PK\x03\x04\x00\x00" + bytes(range(256)), "is not a CSV file", "b"),
    "not UTF-8": ("a,b\ncaf\u00e9,1\n".encode("latin-1"), "is not a CSV file in UTF-8", "b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_doubtful_table_is_refused_by_name(write, case):
    content, message, target = REFUSED[case]
    with pytest.raises(data.DataError, match=message):
        data.load_csv(write(content), target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 0.0}, "`test_fraction` must be between 0 and 1, got 0.0"),
        ({"test_fraction": 1.5}, "`test_fraction` must be between 0 and 1"),
        ({"split": -1}, "`split` must be 0 or more, got -1"),
        ({"missing": "fill"}, '`missing` must be "refuse" or "drop", got \'fill\''),
        ({"constant": "keep"}, '`constant` must be "refuse" or "drop"'),
        ({"task": "ranking"}, '`task` must be "regression" or "classification", got \'ranking\''),
        ({"ignore": ["citty"]}, r"no column 'citty': did you mean 'city'\?"),
        ({"task": "classification"}, 'too many classes: use task="regression"'),
    ],
)
def test_options_out_of_range_are_refused(write, options, message):
    with pytest.raises(data.DataError, match=message):
        data.load_csv(write(table()), "price", **options)


def test_a_text_target_cannot_be_a_regression(write):
    with pytest.raises(data.DataError, match="a regression needs a target of numbers, but 'city' holds 'York'"):
        data.load_csv(write(table()), "city", task="regression")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(data.DataError, match=r"no file .*absent\.csv"):
        data.load_csv(tmp_path / "absent.csv", "price")
    with pytest.raises(data.DataError, match="no file"):
        data.load_csv(tmp_path, "price")


def test_rows_with_missing_values_are_dropped_on_request(write):
    loaded = data.load_csv(write(with_hole(1, 4)), "price", missing="drop", dtype=torch.float64)
    assert len(loaded.x_train) + len(loaded.x_test) == 38
    kept = torch.cat(loaded.targets_original()).tolist()
    assert sorted(kept) == pytest.approx(sorted(table()["price"].drop([1, 4])))


def test_constant_columns_are_dropped_on_request(write):
    frame = with_column("year", 2020)
    frame["note"] = np.nan
    loaded = data.load_csv(write(frame), "price", constant="drop")
    assert loaded.feature_names == data.load_csv(write(table()), "price").feature_names


def test_ignored_columns_are_left_out(write):
    frame = with_column("id", [f"home {row}" for row in range(40)])
    loaded = data.load_csv(write(frame), "price", ignore=["id", "city"])
    assert loaded.feature_names == ("area", "rooms", "garden")


def test_a_boolean_column_with_holes_stays_boolean(write):
    frame = table()
    frame["garden"] = frame["garden"].astype(object)
    frame.loc[3, "garden"] = np.nan
    loaded = data.load_csv(write(frame), "price", missing="drop")
    assert loaded.preprocessor.columns[2] == Column("garden", "boolean")


@pytest.fixture
def preprocessor(write):
    return data.load_csv(write(table()), "price").preprocessor


def test_new_rows_become_the_inputs_that_the_training_rows_had(write):
    path = write(table())
    loaded = data.load_csv(path, "price", split=5, dtype=torch.float64)
    inputs = loaded.preprocessor.transform(data.read_csv(path), torch.float64)
    rows = {tuple(row) for row in inputs.numpy().round(10).tolist()}
    assert {tuple(row) for row in loaded.x_test.numpy().round(10).tolist()} <= rows
    shuffled = table().drop(columns="price")[["city", "garden", "rooms", "area"]].assign(extra=1)
    torch.testing.assert_close(loaded.preprocessor.transform(shuffled, torch.float64), inputs)


def test_a_preprocessor_survives_json(preprocessor):
    again = data.Preprocessor.from_json(preprocessor.to_json())
    assert again == preprocessor
    assert torch.equal(again.transform(table()), preprocessor.transform(table()))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "columns": 3}', "null"])
def test_foreign_json_is_refused(text):
    with pytest.raises(data.DataError, match="expected the JSON of a preprocessor"):
        data.Preprocessor.from_json(text)


def test_another_version_of_json_is_refused(preprocessor):
    text = preprocessor.to_json().replace('"version": 1', '"version": 99')
    with pytest.raises(data.DataError, match="version 1, got version 99"):
        data.Preprocessor.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="rooms"), "no column 'rooms': .*columns of the table are area, garden"),
        (lambda frame: frame.rename(columns={"rooms": "room"}), r"no column 'rooms': did you mean 'room'\?"),
        (
            lambda frame: frame.assign(city=["Rome", *frame["city"][1:]]),
            "column 'city' has the unknown category 'Rome' in row 1; the categories are Bath, Ely, York",
        ),
        (
            lambda frame: frame.assign(area=["big", *frame["area"][1:]]),
            "'area' should hold a number, but row 1 has 'big'",
        ),
        (
            lambda frame: frame.assign(garden="maybe"),
            r"'garden' should hold true or false, but rows 1, 2.* has 'maybe'",
        ),
        (
            lambda frame: frame.assign(area=[np.nan, *frame["area"][1:]]),
            "'area' has missing or infinite values in row 1",
        ),
        (lambda frame: frame.iloc[:0], "expected at least one row to predict on"),
    ],
)
def test_new_rows_that_do_not_fit_are_refused(preprocessor, change, message):
    with pytest.raises(data.DataError, match=message):
        preprocessor.transform(change(table()))


def test_a_single_new_row_with_numbers_for_booleans_is_read(preprocessor):
    row = table().iloc[:1].assign(garden=1)
    torch.testing.assert_close(preprocessor.transform(row), preprocessor.transform(table().iloc[:1]))
