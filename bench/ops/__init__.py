"""One module an op, each with one `CASE`. No timing, printing or argument parsing in them."""

import importlib
import pkgutil

from ..case import Case


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(op: str) -> Case:
    return importlib.import_module(f"{__name__}.{op}").CASE
