"""What experiments over seeds share: variants, rows that are kept, and errors over seeds.

A variant is written ``name:key=value,key=value``, with options of the model that it changes.
"""

import argparse
import datetime
import functools
import json
import math
import time

import numpy as np
import torch
import yaml
from command import Command
from threadpoolctl import threadpool_limits

from equipoise.config import make_config
from equipoise.data.dataset import Data
from equipoise.estimate import Estimate
from equipoise.files import whole_file
from equipoise.provenance import data_record, provenance
from equipoise.randomness import stream_seed
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer


def arguments(description, out, option, known):
    """Make a parser with the options that all experiments have.

    Args:
        description: What the experiment is about.
        out: Where its JSON goes by default.
        option: Name of the option that lists variants.
        known: Options of the variants that need only be named; all of them are the default.

    Returns:
        The parser.
    """
    parser = Command(description, out)
    parser.add_argument(
        option,
        nargs="+",
        default=list(known.items()),
        type=functools.partial(variant, known=known),
        metavar="NAME:KEY=VALUE,...",
        help=f"variants to compare; those that need only a name are {', '.join(known)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser


def variant(text, known):
    """Read the name and the options of a variant; options without a name are their own name."""
    if text in known:
        return text, known[text]

    name, _, pairs = text.partition(":") if ":" in text else (text, "", text)
    options = {}
    for pair in pairs.split(","):
        key, equals, value = pair.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither one of {', '.join(known)} nor NAME:KEY=VALUE,KEY=VALUE"
            )
        options[key] = yaml.safe_load(value)
    return name, options


class Rows:
    """Finished rows of an experiment, in a JSON file with a line for each.

    A row that is there is not computed again. After a change of the library, take another file.
    """

    def __init__(self, path):
        self.path = path
        self.rows = json.loads(path.read_text())["rows"] if path.is_file() else []

    def find_or_make(self, key, make, *inputs):
        """Return the row with this key; if there is none, make it of the inputs and write it."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row

        started = time.perf_counter()
        figures = make(*inputs)
        seconds = round(time.perf_counter() - started, 1)
        row = key | figures | {"seconds": seconds, "date": datetime.date.today().isoformat()}

        self.rows.append(row)
        self.write()
        shown = {name: value for name, value in row.items() if not isinstance(value, list | dict)}
        print(json.dumps(shown), flush=True)
        return row

    def write(self, **summary):
        """Write the file, completely or not at all, with what follows from the rows."""
        head = json.dumps(provenance() | summary, indent=2).removesuffix("\n}")
        lines = ",\n    ".join(json.dumps(row) for row in self.rows)
        with whole_file(self.path) as temporary:
            temporary.write_text(f'{head},\n  "rows": [\n    {lines}\n  ]\n}}\n')


def one_thread():
    """Compute everything with one thread, so that runs beside each other change no figure."""
    torch.set_num_threads(1)
    threadpool_limits(1)


def facts(data):
    """Say which data a row is about, in its key."""
    record = data_record(data)
    return {"fingerprint": record["fingerprint"][:12], "n_train": record["n_train"]}


def trained(data: Data, options):
    """Train a model as the command does.

    Args:
        data: The data.
        options: Options of training, which are checked.

    Returns:
        The trainer that has finished, and its history.
    """
    config = make_config(options)
    torch.manual_seed(stream_seed(config.seed, "weights"))
    trainer = Trainer(make_model(data, config), data, config)
    return trainer, trainer.fit()


def start(data, config):
    """Make the untrained networks, which are the same every time."""
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002 (scikit-learn's mixture in pythae draws from it)
    return make_model(data, config)


def scaled(model, part):
    """Return images in model units."""
    return model.scaling(torch.from_numpy(part[:]))


class Clock:
    """Measures the seconds between laps."""

    def __init__(self):
        self.last = time.perf_counter()
        self.seconds = {}

    def lap(self, name):
        """End a lap, and start the next."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self.last, 2)
        self.last = now


def over_seeds(values):
    """Average over seeds, as text with the standard error, of which two digits are shown."""
    value, error, _ = Estimate.of_mean(np.array(values, float))
    if not error:
        return f"{value:.4g}"

    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def paired(rows, others, figure):
    """Average the difference of two variants over their common seeds, as text."""
    of_others = {row["seed"]: row[figure] for row in others}
    return over_seeds([row[figure] - of_others[row["seed"]] for row in rows])
