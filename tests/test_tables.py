"""Tables from files: what is read, what is refused, and the names of columns everywhere."""

import gzip
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

import equipoise
from equipoise.cli import main
from equipoise.config import TrainConfig
from equipoise.data import load, load_examples
from equipoise.data.gate import Limits
from equipoise.data.tables import is_table, read_table, write_filled, write_table
from equipoise.gaussian import standard_normal_log_prob
from equipoise.metrics.rows import score_rows, worst_columns
from equipoise.model import VAE, Scaling
from equipoise.outputs import beside

ROWS = np.random.default_rng(0).normal(size=(60, 3)).round(3)
NAMES = ("age", "income, net", "größe")


def text_of(values=ROWS, separator=",", comma=".", names=NAMES, gap=""):
    """Write a table as text, with a gap in the first row's second column."""
    lines = []
    if names:
        lines.append(separator.join(f'"{n}"' if separator in n else n for n in names))
    for number, row in enumerate(values):
        cells = [f"{value:.3f}".replace(".", comma) for value in row]
        if number == 0:
            cells[1] = gap
        lines.append(separator.join(cells))
    return "\n".join(lines) + "\n"


def expected():
    values = ROWS.copy()
    values[0, 1] = np.nan
    return values


class TestReading:
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_last_line_that_was_cut_off_is_named(self, tmp_path, packed):
        """As of a download that broke off: its cells are not taken for gaps without a word."""
        path = tmp_path / ("a.csv.gz" if packed else "a.csv")
        whole = text_of(names=("a", "b", "c"))

        def notes(text):
            path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
            return read_table(path).notes

        assert notes(whole) == notes(whole.rstrip("\n")) == ()
        (note,) = notes(whole.rstrip("\n").rpartition(",")[0])
        assert note.startswith("the last line has 2 of 3 cells and no line break")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", text_of().encode()),
            ("a.csv", text_of(gap="NA").encode()),
            ("a.csv", b"\xef\xbb\xbf" + text_of().replace("\n", "\r\n").encode()),
            ("a.csv", text_of(separator=";", comma=",").encode()),
            ("a.csv", text_of(separator=";", comma=",").encode("cp1252")),
            ("a.csv", text_of(separator="\t").encode("utf-16")),
            ("a.CSV", text_of(separator="|").encode()),
            ("a.tsv", text_of(separator="\t").encode()),
            ("a.csv.gz", gzip.compress(text_of().encode())),
            ("a.tsv.gz", gzip.compress(text_of(separator="\t", gap="nan").encode())),
            ("a.csv", text_of(separator=", ", names=("age", "income", "größe")).encode()),
        ],
    )
    def test_text_in_any_dress_is_the_same_table(self, tmp_path, name, content):
        path = tmp_path / name
        path.write_bytes(content)
        table = read_table(path)
        np.testing.assert_array_equal(table.values(), expected())
        assert [column.name[:6] for column in table.columns] == ["age", "income", "größe"]
        assert [column.n_missing for column in table.columns] == [0, 1, 0]

    @pytest.mark.parametrize("ending", [".parquet", ".feather", ".csv", ".csv.gz", ".tsv"])
    def test_what_is_written_is_read(self, tmp_path, ending):
        path = tmp_path / f"rows{ending}"
        write_table(path, dict(zip(NAMES, expected().T, strict=True)))
        table = read_table(path)
        np.testing.assert_array_equal(table.values(), expected())
        assert tuple(column.name for column in table.columns) == NAMES

    def test_a_file_without_names(self, tmp_path):
        (tmp_path / "a.csv").write_text(text_of(names=()))
        table = read_table(tmp_path / "a.csv")
        np.testing.assert_array_equal(table.values(), expected())
        assert not table.has_names
        assert load(tmp_path / "a.csv").columns == ()

    def test_whole_numbers_that_become_real_late_in_the_file(self, tmp_path):
        lines = ["a,b", *["1,2"] * 20_000, "1.5,3"]
        (tmp_path / "a.csv").write_text("\n".join(lines))
        assert read_table(tmp_path / "a.csv").values()[-1].tolist() == [1.5, 3.0]

    def test_columns_are_taken_and_left_out_by_name(self, tmp_path):
        (tmp_path / "a.csv").write_text(text_of())
        data = load(tmp_path / "a.csv", columns=["größe", "age"])
        assert data.columns == ("größe", "age")
        assert data.loading["columns"] == ["größe", "age"]
        assert load(tmp_path / "a.csv", drop=["age"]).columns == NAMES[1:]
        with pytest.raises(ValueError, match=r"no column 'agee' among .* did you mean 'age'"):
            load(tmp_path / "a.csv", columns=["agee"])
        with pytest.raises(ValueError, match="no column is left"):
            load(tmp_path / "a.csv", drop=list(NAMES))
        with pytest.raises(ValueError, match="tables in files with names"):
            load(ROWS, drop=["age"])

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ([f"no. {i}" for i in range(60)], "text in 'x' .*like names.* --drop x"),
            (["2024-01-02"] * 60, "dates in 'x'.* days since"),
            (["31.12.2024"] * 60, "dates in 'x'"),
            (
                [*map(str, range(59)), "?!"],
                r"1 of 60 cells are no numbers, the first is '\?!' in row",
            ),
            ([""] * 60, "no value at all in 'x'"),
        ],
    )
    def test_what_is_no_number_is_refused_by_name(self, tmp_path, column, message):
        write_table(tmp_path / "a.csv", {"y": ROWS[:, 0], "x": column})
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a.csv")
        assert load(tmp_path / "a.csv", columns=["y"]).columns == ("y",)

    def test_types_of_parquet(self, tmp_path):
        frame = pl.DataFrame(
            {
                "flag": [True, False] * 10,
                "n": pl.Series(range(20), dtype=pl.UInt8),
                "list": [[1, 2]] * 20,
                "time": pl.Series([0] * 20, dtype=pl.Datetime),
                "kind": pl.Series(["a", "b"] * 10, dtype=pl.Categorical),
            }
        )
        frame.write_parquet(tmp_path / "a.parquet")
        table = read_table(tmp_path / "a.parquet")
        assert [column.kind for column in table.columns[:2]] == ["true or false", "whole numbers"]
        with pytest.raises(ValueError, match=r"List.* 'list'.*dates in 'time'.*text in 'kind'"):
            table.values()
        assert table.select(["flag", "n"]).values()[1].tolist() == [0.0, 1.0]

    def test_lines_that_end_as_on_an_old_mac(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(text_of().replace("\n", "\r").encode())
        np.testing.assert_array_equal(read_table(tmp_path / "a.csv").values(), expected())

    @pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
    @pytest.mark.parametrize("end", ["\n\n\n", "\r\n\r\n\r\n"])
    def test_empty_lines_at_the_end_are_no_rows(self, tmp_path, name, end):
        content = (text_of().rstrip() + end).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name else content)
        table = read_table(tmp_path / name)
        assert "2 empty lines at the end are left out" in table.notes
        np.testing.assert_array_equal(table.values(), expected())

    def test_rows_without_any_value_are_kept_and_counted(self, tmp_path):
        (tmp_path / "a.csv").write_text(text_of() + ",,\nNaN,,\n")
        table = read_table(tmp_path / "a.csv")
        assert table.values().shape == (62, 3)
        assert "2 rows without any value" in table.describe()
        (tmp_path / "b.csv").write_text("a\n1\n2\n\n")
        assert len(read_table(tmp_path / "b.csv").values()) == 3

    def test_names_in_quotes_and_without_text(self, tmp_path):
        (tmp_path / "a.csv").write_text('"a ""x""","b\nc",,\n1,2,3,4\n2,3,4,5\n')
        names = [column.name for column in read_table(tmp_path / "a.csv").columns]
        assert names == ['a "x"', "b\nc", "column 2", "column 3"]

    @pytest.mark.slow
    def test_lines_longer_than_a_sample(self, tmp_path):
        values = np.random.default_rng(0).normal(size=(12, 30_000)).round(2)
        lines = [";".join(f"feature {i}" for i in range(30_000))]
        lines += [";".join(map(str, row)).replace(".", ",") for row in values]
        (tmp_path / "a.csv").write_text("\n".join(lines))
        table = read_table(tmp_path / "a.csv")
        np.testing.assert_array_equal(table.values(), values)
        assert table.columns[-1].name == "feature 29999"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a,b\n1,2\n1,2,3\n", "line 3 has 3 cells, and the first one 2"),
            ("# from X\na,b\n1,2\n", "line 2 has 2 cells, and the first one 1"),
            ("a\n1,5\n2,5\n", "line 2 has 2 cells, and the first one 1"),
        ],
    )
    def test_lines_of_too_many_cells_are_named(self, tmp_path, text, message):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_table(tmp_path / "a.csv")
        assert "truncate" not in str(caught.value)

    def test_decimals_of_parquet_are_numbers(self, tmp_path):
        values = pl.Series(["1.25", "-3.50", None]).cast(pl.Decimal(8, 2))
        pl.DataFrame({"x": values}).write_parquet(tmp_path / "a.parquet")
        table = read_table(tmp_path / "a.parquet")
        assert table.columns[0][:5] == ("x", "numbers", 1, -3.5, 1.25)
        np.testing.assert_array_equal(table.values()[:, 0], [1.25, -3.5, np.nan])

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", b"", "empty"),
            ("a.csv", b"a,b\n", "0 rows"),
            ("a.csv", b"a,a\n1,2\n", "same name: 'a'"),
            ("a.parquet", b"PAR1 and more", "damaged, or no parquet"),
            ("a.feather", b"no", "damaged, or no feather"),
            ("a.csv.gz", b"no gzip", "damaged"),
            ("a.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 100_000), "unpacks to"),
        ],
    )
    def test_files_that_cannot_be_read(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name, Limits(max_bytes=1000))

    @pytest.mark.parametrize("fill", [1e20, -9999.0, 999.0])
    def test_values_that_stand_for_missing_ones_are_pointed_out(self, tmp_path, fill):
        values = ROWS.copy()
        values[::7, 1] = fill
        write_table(tmp_path / "a.csv", dict(zip("xyz", values.T, strict=True)))
        cautions = load(tmp_path / "a.csv").cautions
        assert len(cautions) == 1
        assert cautions[0].startswith(f"columns 'y' have the value {fill:g}, ")
        assert load(ROWS).cautions == ()
        flags = np.c_[ROWS, np.arange(60) == 3, 1000 * (np.arange(60) % 2), np.exp(4 * ROWS[:, 0])]
        assert load(flags).cautions == ()

    def test_an_index_is_noticed(self, tmp_path):
        write_table(tmp_path / "a.csv", {"": range(60), "x": ROWS[:, 0], "y": ROWS[:, 1]})
        assert any("counts the rows" in note for note in load(tmp_path / "a.csv").notes)
        dropped = load(tmp_path / "a.csv", drop=["column 0"])
        assert not any("counts the rows" in note for note in dropped.notes)
        notes = []
        load_examples(tmp_path / "a.csv", (2,), columns=("x", "y"), on_note=notes.append)
        assert not any("counts the rows" in note for note in notes)

    def test_a_description_shows_all_there_is_to_know(self, tmp_path):
        (tmp_path / "a.csv").write_text(text_of())
        text = read_table(tmp_path / "a.csv").describe()
        assert "60 rows, 3 columns" in text
        assert "1 missing (1.7%)" in text
        assert "größe" in text
        assert f"{ROWS[1, 0]:g}" in text

    def test_without_polars_the_message_says_what_to_install(self, tmp_path, monkeypatch):
        (tmp_path / "a.csv").write_text(text_of())
        monkeypatch.setitem(sys.modules, "polars", None)
        with pytest.raises(ImportError, match=r"pip install 'equipoise\[tables\]'"):
            load(tmp_path / "a.csv")

    def test_endings(self):
        assert not is_table("a.npy")
        assert not is_table("a.parquet.gz")
        with pytest.raises(ValueError, match="tables are written to"):
            write_table(Path("a.xlsx"), {"a": [1]})


class TestNames:
    def test_a_model_finds_its_columns_in_any_order(self, tmp_path):
        (tmp_path / "a.csv").write_text(text_of())
        write_table(
            tmp_path / "b.csv",
            {
                "größe": ROWS[:, 2],
                "note": ["text"] * 60,
                "income, net": ROWS[:, 1],
                "age": ROWS[:, 0],
            },
        )
        found = load_examples(tmp_path / "b.csv", (3,), columns=NAMES)
        np.testing.assert_allclose(found[:], ROWS.astype(np.float32))
        write_table(tmp_path / "c.csv", {"age": ROWS[:, 0], "other": ROWS[:, 1]})
        with pytest.raises(
            ValueError, match=r"no column 'income, net', 'größe' among 'age', 'other'.*empty column"
        ):
            load_examples(tmp_path / "c.csv", (3,), columns=NAMES)

    @pytest.mark.parametrize("ending", [".csv", ".parquet"])
    def test_a_further_table_may_lack_all_values_of_a_column(self, tmp_path, ending):
        path = tmp_path / f"b{ending}"
        write_table(path, {"a": [1.0, 2.0], "b": [None, None]})
        np.testing.assert_array_equal(
            load_examples(path, (2,), columns=("a", "b"))[:], [[1.0, np.nan], [2.0, np.nan]]
        )
        filled = np.array([[False, True]] * 2)
        write_filled(tmp_path / "c.csv", path, ("a", "b"), np.full((2, 2), 0.5), filled)
        assert (tmp_path / "c.csv").read_text() == "a,b\n1.0,0.5\n2.0,0.5\n"

    def test_a_further_table_with_text_is_told_what_its_reader_can_do(self, tmp_path):
        write_table(tmp_path / "b.csv", {"a": ["1", "unknown"], "b": [1.0, 2.0]})
        with pytest.raises(ValueError, match=r"text in 'a'.*leave it empty") as caught:
            load_examples(tmp_path / "b.csv", (2,), columns=("a", "b"))
        assert "--drop" not in str(caught.value)

    def test_data_frames_whose_columns_differ_in_type(self):
        frame = pd.DataFrame(
            {
                "n": pd.array([1, None, 3] * 20, dtype="Int64"),
                "flag": pd.array([True, False, None] * 20, dtype="boolean"),
                "x": ROWS[:, 0],
            }
        )
        data = load(frame)
        found = np.sort(np.concatenate([data.train[:], data.validation[:], data.test[:]]), axis=0)
        expected = np.stack(
            [column.to_numpy(float, na_value=np.nan) for _, column in frame.items()]
        )
        np.testing.assert_array_equal(found, np.sort(expected.T, axis=0).astype(np.float32))
        assert any("22.2% of the values are missing" in note for note in data.notes)

        frame["day"] = pd.date_range("2024-01-01", periods=60)
        with pytest.raises(ValueError, match="the column 'day' holds dates or times"):
            load(frame)

    def test_warnings_and_notes_name_columns(self):
        frame = pd.DataFrame(ROWS, columns=list(NAMES))
        frame["largest"] = 7.0
        assert load(frame).columns == (*NAMES, "largest")
        assert any("constant columns: 'largest'" in note for note in load(frame).notes)

        scaling = Scaling(torch.zeros(3), torch.ones(3), columns=NAMES)
        text = scaling.range_warning(torch.from_numpy(ROWS + np.array([0, 99, 0])))
        assert "Column 'income, net' was 0" in text

    def test_an_estimator_and_its_file_keep_names(self, tmp_path):
        frame = pd.DataFrame(ROWS, columns=list(NAMES))
        options = {"stage_1_epochs": 2, "stage_2_epochs": 0, "random_state": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator = equipoise.VAEEstimator(latent_dim=1, **options).fit(frame)
        estimator.save(tmp_path / "a.safetensors")
        again = equipoise.VAEEstimator.load(tmp_path / "a.safetensors")
        assert again.model_.scaling.columns == NAMES
        with pytest.warns(UserWarning, match="Column 'größe'"):
            again.transform(frame + np.array([0, 0, 1000.0]))

    def test_filled_tables_keep_what_they_had(self, tmp_path):
        source = tmp_path / "a.csv"
        write_table(source, {"who": ["a", "b"], "n": [3, None], "x": [0.1, 0.2]})
        values = np.array([[9.0, 9.0], [4.1, 9.0]], np.float32)
        filled = np.array([[False, False], [True, False]])
        write_filled(tmp_path / "b.csv", source, ["n", "x"], values, filled)
        assert (tmp_path / "b.csv").read_text() == "who,n,x\na,3,0.1\nb,4.1,0.2\n"
        assert beside(source, "std").name == "a-std.csv"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("id,x,day\n007,1.50,1/2/24\n008,NA,\n", "id,x,day\n007,1.50,1/2/24\n008,2.5,\n"),
            ("id;x;y\n1;1,50;2,0\n2;;1e3\n", "id;x;y\n1;1,50;2,0\n2;2,5;1e3\n"),
            ("1,1.50\n2,\n", "1,1.50\n2,2.5\n"),
            ('"i d","x"\n"a, b",1.0\n"say ""x""",\n', 'i d,x\n"a, b",1.0\n"say ""x""",2.5\n'),
        ],
    )
    @pytest.mark.parametrize("packed", ["", ".gz"])
    def test_filled_tables_of_text_keep_their_characters(self, tmp_path, text, expected, packed):
        source, target = tmp_path / f"a.csv{packed}", tmp_path / f"b.csv{packed}"
        opened = gzip.open if packed else open
        with opened(source, "wt") as file:
            file.write(text)
        names = ["x"] if "x" in text else ["column 0", "column 1"]
        values, filled = np.full((2, len(names)), 2.5, np.float32), np.zeros((2, len(names)), bool)
        filled[1, -1] = True
        write_filled(target, source, names, values, filled)
        with opened(target, "rt") as file:
            assert file.read() == expected

    def test_filled_levels_are_spelled_as_in_the_file(self, tmp_path):
        source = tmp_path / "a.csv"
        source.write_text("x,kind,flag,zip\n1, red,true,01\n2,?,false,02\n3,blue,,\n")
        values = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 1]], np.float32)
        filled = np.array([[False, False, False], [True, False, False], [False, True, True]])
        levels = {0: ("blue", "red"), 1: (False, True), 2: (1, 2)}
        write_filled(tmp_path / "b.csv", source, ["kind", "flag", "zip"], values, filled, levels)
        expected = "x,kind,flag,zip\n1, red,true,01\n2, red,false,02\n3,blue,true,02\n"
        assert (tmp_path / "b.csv").read_text() == expected


class TestScores:
    def test_rows_with_gaps_are_compared_with_their_like(self):
        decoder = torch.nn.Linear(1, 3)
        torch.nn.init.zeros_(decoder.weight)
        torch.nn.init.zeros_(decoder.bias)
        scaling = Scaling(torch.zeros(3), torch.ones(3), columns=NAMES)
        parts = (torch.nn.Linear(3, 2), decoder, equipoise.FixedNoise(1.0))
        model = VAE(*parts, shape=(3,), latent_dim=1, scaling=scaling).eval()
        rng = torch.Generator().manual_seed(0)
        reference, raw = torch.randn(300, 3, generator=rng), torch.randn(300, 3, generator=rng)
        raw[::2, 1:] = torch.nan
        raw[0, 0], raw[1, 2] = 9.0, -9.0

        found = score_rows(model, raw, reference, standard_normal_log_prob)
        assert found.p_value[0] == found.p_value[1] == pytest.approx(1 / 301)
        for part in (slice(2, None, 2), slice(3, None, 2)):
            assert 0.4 < found.p_value[part].mean() < 0.6
        assert found.worst[0] == "age +9.0"
        assert found.worst[1].startswith("größe -9.0, ")
        assert worst_columns(model, torch.full((1, 3), torch.nan)) == [""]

        # Whatever the size of a batch does to the last digits.
        for n in (1, 2, 7, 150):
            empty = torch.full((n, 3), torch.nan)
            assert score_rows(model, empty, reference, standard_normal_log_prob).p_value.min() == 1


@pytest.fixture
def command(capsys):
    """Run the command line; return what it printed."""

    def run(*arguments, fails=False):
        code = 0
        try:
            main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        assert bool(code) == fails
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


class TestCommandLine:
    def test_from_a_file_with_gaps_to_imputed_values_and_scores(self, tmp_path, command):
        rng = np.random.default_rng(1)
        values = rng.normal(size=(200, 1)) @ [[1.0, -2.0, 3.0]] + 0.2 * rng.normal(size=(200, 3))
        columns = dict(
            zip(NAMES, np.where(rng.random((200, 3)) < 0.2, np.nan, values).T, strict=True)
        )
        path, run = tmp_path / "rows.csv", tmp_path / "run"
        write_table(path, {"who": [f"no. {i}" for i in range(200)], **columns})

        text = command("train", path, "--dry-run", fails=True)
        assert "text in 'who'" in text
        assert "--drop who" in text
        assert "--categorical who" in text
        text = command("train", path, "--drop", "who", "--dry-run")
        assert "Nothing was trained" in text
        assert not run.exists()

        short = ("stage_1_epochs=30", "stage_2_epochs=0", "latent_dim=1", "batch_size=32")
        command("train", path, "--drop", "who", "--out", run, "--quiet", "--set", *short)
        text = command("impute", run, path, "--draws", "1")
        assert "of 600 values were missing" in text
        filled = read_table(run / "imputed" / "rows-imputed.csv")
        assert [column.name for column in filled.columns] == ["who", *NAMES]
        assert not any(column.n_missing for column in filled.columns)
        assert (run / "imputed" / "rows-imputed-1.csv").is_file()

        values[5] = [50.0, 50.0, 50.0]
        write_table(tmp_path / "new.parquet", dict(zip(NAMES, values.T, strict=True)))
        text = command("score", run, tmp_path / "new.parquet", "--out", tmp_path / "scores.csv")
        assert "rows are odd" in text
        scores = pl.read_csv(tmp_path / "scores.csv")
        assert scores.columns == ["row", "score", "p_value", "verdict", "worst_columns"]
        assert scores["verdict"][5] == "odd"
        assert scores["score"].arg_min() == 5
        text = command("score", run, tmp_path / "new.parquet", "--fail-on-odd", fails=True)
        assert "rows are odd" in text

        command("sample", run, "-n", "4", "--noise", "--out", tmp_path / "s.csv")
        command("reconstruct", run, path, "--out", tmp_path / "r.parquet")
        for file, height in (("s.csv", 4), ("r.parquet", 200), ("r-std.parquet", 200)):
            table = read_table(tmp_path / file)
            assert table.frame.height == height
            assert tuple(column.name for column in table.columns) == NAMES

        write_table(tmp_path / "far.csv", dict(zip(NAMES, 1e3 * values.T + 1e5, strict=True)))
        for name, *out in (("impute",), ("reconstruct", "--out", tmp_path / "far-r.csv")):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                text = command(name, run, tmp_path / "far.csv", *out)
            assert "in the same unit?" in text + "".join(str(w.message) for w in caught)

        before = path.read_bytes()
        assert "the table itself" in command("impute", run, path, "--out", path, fails=True)
        assert path.read_bytes() == before
        for name, file in (("impute", "a.txt"), ("sample", "a.xlsx"), ("reconstruct", "a.txt")):
            table = [] if name == "sample" else [path]
            text = command(name, run, *table, "--out", tmp_path / file, fails=True)
            assert ".csv" in text
            assert not (tmp_path / file).exists()

        assert "at least 999 held-out rows" in command(
            "score", run, "--false-alarm-rate", "0.001", fails=True
        )


def test_constant_columns_do_not_count_for_the_number_of_latent_units(tmp_path):
    """A run of an earlier version, which has 'auto' in its options, goes on as it began."""
    raw = np.random.default_rng(0).normal(size=(60, 12))
    options = TrainConfig(width=4, stage_1_epochs=1, stage_2_epochs=0, n_components=1)
    assert equipoise.train(load(raw), options, tmp_path / "all").model().latent_dim == 6

    raw[:, 4:] = 3.0
    run = equipoise.train(load(raw), options, tmp_path / "few")
    assert run.model().latent_dim == run.config().latent_dim == 2
    again = equipoise.train(load(raw), options, run.folder, resume="auto")
    assert again.model().latent_dim == 2

    estimator = equipoise.VAEEstimator(stage_1_epochs=1, stage_2_epochs=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert estimator.fit(raw).model_.latent_dim == 2
