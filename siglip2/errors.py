"""Errors a user can act on: what is needed, what came, what to do.

One base class, `Siglip2Error`.
"""


class Siglip2Error(Exception):
    """Base of every error raised here on purpose beyond ValueError and NotImplementedError."""


class ConfigError(Siglip2Error, ValueError):
    """A configuration key or value is wrong."""


class DataError(Siglip2Error, ValueError):
    """A data source cannot be read as asked."""


class TextError(Siglip2Error, ValueError):
    """A tokenizer does not do what SigLIP 2 needs."""


class CheckpointError(Siglip2Error, ValueError):
    """A file holds other weights than expected."""


class NonFiniteLossError(Siglip2Error, ArithmeticError):
    """The loss or a gradient became NaN or infinite."""


class MissingDependencyError(Siglip2Error, ImportError):
    """An optional package is needed."""


def require(module: str, extra: str) -> object:
    """Import an optional module, or say which extra brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"needs the package {module.split('.')[0]!r}: pip install 'siglip2[{extra}]'"
        ) from None
