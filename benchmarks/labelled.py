"""Labels of the image sets, in the order in which `equipoise.data.load` gives their examples."""

import gzip
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

FILES = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


def labels(data):
    """Read the labels of MNIST, Fashion-MNIST or digits.

    Args:
        data: The examples, loaded by their name.

    Returns:
        Labels of the training, the validation and the test part.
    """
    if data.name == "digits":
        of_train = of_test = load_digits(return_X_y=True)[1]
    else:
        of_train, of_test = (read(Path(data.source) / name) for name in FILES)

    parts = [(data.train, of_train), (data.validation, of_train), (data.test, of_test)]
    return [values[part.indices] for part, values in parts]


def read(path):
    """Read a plain or gzipped file of labels: eight bytes of header, and a byte for each."""
    packed = path.with_name(path.name + ".gz")
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    return np.frombuffer(content, np.uint8, offset=8)
