"""What the commands of all benchmarks share: their options, and where their JSON goes.

It imports no torch, since some benchmarks measure the memory of a process that they start.
"""

import argparse
from pathlib import Path

TINY = {
    "latent_dim": 3,
    "width": 4,
    "batch_size": 64,
    "stage_1_epochs": 1,
    "stage_2_epochs": 1,
    "n_components": 2,
}
"""Options of the smallest model."""
SCRATCH = Path("results-scratch")
"""Where figures of the smallest size go, which say nothing. Git ignores it."""


class Command(argparse.ArgumentParser):
    """Reads the options of a benchmark, of which all have ``--out`` and ``--tiny``.

    Args:
        doc: What the benchmark is about, which is the first line of its docstring.
        out: Where its JSON goes by default, such as ``results/x-{data}.json``, where ``{data}``
            stands for the option of that name. The option is required if there is no default.
        data: The data, where no option names it. The smallest size always takes digits.
    """

    def __init__(self, doc, out=None, data=None):
        super().__init__(description=doc.splitlines()[0])
        self.out = out
        if data:
            self.set_defaults(data=data)
        self.add_argument(
            "--out", type=Path, required=out is None, help=f"JSON file to write ({out})"
        )
        self.add_argument(
            "--tiny", action="store_true", help="the smallest size, to see that it runs"
        )

    def parse_args(self, args=None, namespace=None):
        """Read the options, and choose data and file of the smallest size."""
        options = super().parse_args(args, namespace)
        if options.tiny and isinstance(getattr(options, "data", None), str):
            options.data = "digits"

        if options.out is None:
            options.out = Path(self.out.format(**vars(options)))
            if options.tiny:
                options.out = SCRATCH / options.out.name
        return options
