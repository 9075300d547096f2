"""What follows training: numbers, an export that other libraries load, and a page to look at."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import Config
from ..data.sources import open_source
from ..errors import ConfigError
from ..locca import save_decoder
from ..models.decoder import Decoder
from ..models.factory import from_pretrained, save_pretrained
from ..models.siglip2 import Siglip2
from . import setup


def val_sources(config: Config) -> dict[str, Any]:
    """`data.val` as name -> source."""
    val = config.data.val
    named = val if isinstance(val, dict) else {"val": val} if val else {}
    return {name: open_source(spec, config.data) for name, spec in named.items()}


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal; one line elsewhere."""
    if not sys.stdout.isatty():
        print(text, flush=True)
        yield lambda _: None
        return
    from rich.console import Console

    with Console().status(text) as shown:
        yield shown.update


def evaluate_run(run: Any, model: Siglip2, decoder: Decoder | None) -> Any:
    """Numbers of a run's model, and of its decoder, on its `data.val`: an `EvalResult`."""
    from ..eval.dense_report import add_dense
    from ..eval.locca import add_locca, make_speaker
    from ..eval.runner import evaluate

    sources, config = val_sources(run.config), run.config.eval
    with status("evaluating") as progress:
        result = evaluate(
            model,
            sources,
            run.transform,
            run.tokenizer,
            config,
            seen_budgets=run.config.data.patch_budgets,
            progress=progress,
        )
        result = add_dense(result, model, sources, run.config.data, config, progress=progress)
        speaker = make_speaker(model, decoder, run.tokenizer, run.transform)
        return add_locca(result, speaker, sources, config, progress=progress)


def finish(run: Any, model: Siglip2, decoder: Decoder | None) -> None:
    """Evaluate, export to `export/`, and write report.html into the run's folder."""
    from ..eval.gallery import collect_gallery
    from ..eval.locca import make_speaker
    from ..eval.locca_examples import collect_examples
    from ..eval.report import write_report
    from ..eval.table import format_table

    export = run.dir / "export"
    released_pool = model.architecture.text.pool == "last"
    save_pretrained(
        model,
        export,
        format="hf" if released_pool else "big_vision",
        tokenizer=run.tokenizer,
    )
    if decoder is not None:
        save_decoder(decoder, export)
    print(f"weights in {export}")
    sources = val_sources(run.config)
    if sources:
        result = evaluate_run(run, model, decoder)
        result.write_json(run.dir / "eval.json")
        print(format_table(result, max_languages=0))
        with status("collecting examples"):
            collect_gallery(model, sources, run.transform, run.tokenizer).save(run.dir / "gallery")
            speaker = make_speaker(model, decoder, run.tokenizer, run.transform)
            collect_examples(speaker, sources, result.locca).save(run.dir / "locca")
    print(f"report in {write_report(run.dir)}")


def evaluate_model(where: str, config: Config, *, language: str | None, out: str | None) -> None:
    """`siglip2 eval`: a model from disk on one source."""
    from ..data.tokenizer import get_tokenizer
    from ..eval.dense_report import add_dense
    from ..eval.locca import add_locca, find_speaker
    from ..eval.runner import evaluate
    from ..eval.table import print_result

    path = Path(where)
    if (path / "export" / "config.json").is_file():
        path, where = path / "export", str(path / "export")
    model = from_pretrained(where)
    named = config.data.tokenizer or where
    if path.exists() and not config.data.tokenizer and not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{where} has no tokenizer.json: pass --tokenizer")
    tokenizer = get_tokenizer(named, text_length=model.architecture.text.length)
    transform = setup.build_transform(model, config.data)
    sources, speaker = val_sources(config), find_speaker(path, model, tokenizer, transform)
    with status("evaluating") as progress:
        result = evaluate(model, sources, transform, tokenizer, config.eval, progress=progress)
        result = add_dense(result, model, sources, config.data, config.eval, progress=progress)
        result = add_locca(result, speaker, sources, config.eval, progress=progress)
    print_result(result, language=language)
    if out:
        result.write_json(out)
        print(f"wrote {out}")
