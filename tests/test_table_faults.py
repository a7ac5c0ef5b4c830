"""What tables of users have broken: each case was a quiet error, or a message that did not help."""

import codecs
import datetime

import numpy as np
import pytest
import torch

import equipoise
from equipoise import VAEEstimator, VAEImputer
from equipoise.cli import main
from equipoise.data import load
from equipoise.data.packing import pack
from equipoise.data.tables import SAMPLE_BYTES, read_table

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
QUICK = {"latent_dim": 1, "width": 8, "stage_1_epochs": 2, "stage_2_epochs": 0, "random_state": 0}


def people(n=120):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"a": rng.normal(size=n), "b": rng.normal(size=n), "kind": rng.choice(["x", "y"], n)}
    )


@pytest.mark.parametrize("last", ["Kern", "Käß", "груша", "яблоко", "木", "🌰"])
@pytest.mark.parametrize("size", [5, SAMPLE_BYTES])
def test_utf_8_is_recognised_wherever_the_sample_ends(tmp_path, last, size):
    for shift in range(4):
        line = f"0.5,1.5,{last}\n"
        n = 1 + size // len(line.encode())
        path = tmp_path / f"{shift}.csv"
        path.write_text("x" * shift + "a,b,kind\n" + line * n, encoding="utf-8")
        table = read_table(path)
        assert set(table.frame["kind"]) == {last}
        assert not any("cp1252" in note for note in table.notes)


def test_text_that_is_no_encoding_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n1,\x81\n2,\xff\x8f\n")
    with pytest.raises(ValueError, match="convert it to UTF-8 first"):
        read_table(path)
    path.write_bytes(codecs.encode("a,b\n1,ä\n2,ö\n", "cp1252"))
    assert list(read_table(path).frame["b"]) == ["ä", "ö"]


def test_rows_keep_their_index(tmp_path):
    frame = people().set_index(np.random.default_rng(1).permutation(120) + 1000)
    frame.loc[frame.index[3], "kind"] = None
    imputer = VAEImputer(VAEEstimator(**QUICK)).fit(frame)
    filled = imputer.transform(frame)
    assert (filled.index == frame.index).all()
    assert not filled["kind"].isna().any()
    assert (imputer.estimator_.reconstruct(frame).mean.index == frame.index).all()
    assert (imputer.sample(frame, 2)[1].index == frame.index).all()


@pytest.mark.parametrize("library", ["pandas", "polars"])
@pytest.mark.parametrize("value", [datetime.date(2024, 1, 1), datetime.timedelta(days=3)])
def test_times_in_data_frames_are_refused_as_in_files(library, value):
    columns = {"a": np.arange(50.0), "when": [value] * 50, "kind": ["x", "y"] * 25}
    if library == "polars":
        frame = pl.DataFrame(columns)
    else:
        convert = pd.to_timedelta if isinstance(value, datetime.timedelta) else pd.to_datetime
        frame = pd.DataFrame(columns | {"when": convert(columns["when"])})
    for use in (lambda: VAEEstimator(**QUICK).fit(frame), lambda: load(frame)):
        with pytest.raises(ValueError, match="the column 'when' holds dates or times"):
            use()


def test_numbers_with_fractions_are_no_categories(tmp_path):
    frame = people()
    frame.to_csv(tmp_path / "x.csv", index=False)
    for source in (frame, tmp_path / "x.csv"):
        with pytest.raises(ValueError, match="the column 'a' holds numbers with fractions"):
            load(source, categorical=["a"])


def test_columns_of_one_name_are_refused():
    frame = pd.concat([people(), people()], axis=1)
    with pytest.raises(ValueError, match="several columns have the name 'a'"):
        VAEEstimator(**QUICK).fit(frame)


@pytest.mark.filterwarnings("error:.*no levels.*")
def test_another_order_of_columns_is_named_before_levels_are_looked_up():
    frame = people()
    vae = VAEEstimator(**QUICK).fit(frame)
    with pytest.raises(ValueError, match="same order"):
        vae.score_samples(frame[frame.columns[::-1]])
    assert len(vae.score_samples(frame[frame.columns[::-1]][vae.feature_names_in_])) == len(frame)


def test_infinite_values_are_named_by_row_and_column(tmp_path):
    frame = people().drop(columns="kind")
    frame.loc[7, "b"] = np.inf
    frame.to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(ValueError, match="the first in row 7, column 'b'"):
        load(tmp_path / "x.csv")


def test_a_table_of_one_column_is_refused_before_training(tmp_path, capsys):
    people()[["a"]].to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "x.csv"), "--dry-run"])
    assert "give a table of two columns or more" in capsys.readouterr().err


def test_packing_names_the_file_of_the_user_and_its_flags(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "people.csv"
    people().assign(flag=lambda frame: frame["a"] > 0).to_csv(path, index=False)
    with pytest.raises(ValueError, match=rf"{path}.*kind"):
        pack(path, tmp_path / "packed")
    said = []
    pack(path, tmp_path / "packed", drop=["kind"], say=said.append)
    assert any("columns of flags become the numbers 0 and 1" in text for text in said)
    assert equipoise.load_stream(tmp_path / "packed").columns == ("a", "b", "flag")


@pytest.mark.filterwarnings("ignore")
def test_tables_of_arrow_are_frames_and_lazy_ones_are_refused():
    arrow = pytest.importorskip("pyarrow")
    frame = people(60)
    table = arrow.Table.from_pandas(frame, preserve_index=False)
    assert load(table).columns == load(frame).columns
    ours, theirs = VAEEstimator(**QUICK).fit(table), VAEEstimator(**QUICK).fit(frame)
    np.testing.assert_array_equal(ours.score_samples(table), theirs.score_samples(frame))
    of_arrow = table.to_pandas(types_mapper=pd.ArrowDtype)
    np.testing.assert_array_equal(ours.score_samples(of_arrow), theirs.score_samples(frame))
    np.testing.assert_array_equal(
        VAEEstimator(**QUICK).fit(of_arrow).score_samples(frame), theirs.score_samples(frame)
    )
    frame.loc[3, "kind"] = None
    table = arrow.Table.from_pandas(frame, preserve_index=False)
    filled = VAEImputer(VAEEstimator(**QUICK), random_state=0).fit(table).transform(table)
    assert filled["kind"].is_null().sum() == 0

    for use in (load, VAEEstimator(**QUICK).fit, VAEImputer().fit):
        with pytest.raises(ValueError, match=r"a lazy frame; give what its method collect\(\)"):
            use(pl.from_pandas(frame).lazy())


def test_arrays_of_objects_are_read_by_their_values():
    numbers = people(40)[["a", "b"]].to_numpy(copy=True)
    objects = numbers.astype(object)
    objects[3, 1] = None
    numbers[3, 1] = np.nan
    np.testing.assert_array_equal(load(objects).train[:], load(numbers).train[:])
    objects[5, 0] = "abc"
    with pytest.raises(ValueError, match=r"columns 0 \(such as 'abc'\) hold no numbers"):
        load(objects)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(np.asarray, "an array"), (torch.from_numpy, "a tensor"), (pd.DataFrame, "a data frame")],
)
def test_messages_name_data_in_memory_by_what_they_are(make, kind):
    with pytest.raises(ValueError, match=f"^{kind}: "):
        load(make(np.ones((40, 2))))
