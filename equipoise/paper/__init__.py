"""The paper's comparison: one module for each table and figure, and for what goes beyond the paper.

Each module has three functions: ``specs(lab)`` lists the models that it needs, ``compute(lab)``
returns the figures of one seed as JSON values, and ``markdown(content)`` lays the figures of one or
several seeds out for the page of results. If it has pictures, ``draw(lab, content)`` draws them.
"""

from types import ModuleType

from equipoise.paper import (
    beyond_codes,
    beyond_noise,
    beyond_size,
    figure_1,
    figure_2,
    figure_3,
    figure_4,
    table_1,
    table_2,
    table_3,
    table_4,
)

ITEMS: dict[str, ModuleType] = {
    "table-1": table_1,
    "table-2": table_2,
    "table-3": table_3,
    "table-4": table_4,
    "figure-1": figure_1,
    "figure-2": figure_2,
    "figure-3": figure_3,
    "figure-4": figure_4,
    "beyond-codes": beyond_codes,
    "beyond-noise": beyond_noise,
    "beyond-size": beyond_size,
}
"""The modules, by the name that the command line takes."""
