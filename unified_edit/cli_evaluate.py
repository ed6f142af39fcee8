"""The commands that score a model, before and after an update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from unified_edit.console import (
    Chat,
    Device,
    Dtype,
    Force,
    Json,
    Limit,
    Model,
    check_new,
    one_line_errors,
    show,
    write_lines,
)

if TYPE_CHECKING:
    from torch import nn

    from unified_edit.evaluate.intervals import MeanScores

evaluate = typer.Typer(
    help="Score a model on published metrics, before and after an update.",
    no_args_is_help=True,
)

Update = Annotated[
    Path | None, typer.Option(help="Score the model with this update, too.")
]
PerRecord = Annotated[
    Path | None, typer.Option(help="Write each record's scores here, as .jsonl.")
]
Scores = TypeVar("Scores")


@evaluate.command()
def counterfact(
    model: Model,
    records: Annotated[Path, typer.Argument(help="Records as in CounterFact.")],
    update: Update = None,
    limit: Limit = None,
    no_generations: Annotated[
        bool, typer.Option("--no-generations", help="Skip free generation.")
    ] = False,
    entropy: Annotated[
        int | None,
        typer.Option(
            help="Also sample texts of so many tokens, prompt included (published: "
            "100), and tell their entropy in bits. Slow: ten texts for each record.",
            min=1,
            metavar="TOKENS",
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            help="With --entropy: also how near those texts are to the ones in this "
            "file, ROME's attribute_snippets.json."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled texts.", min=0)] = 0,
    chat: Chat = False,
    per_record: PerRecord = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """CounterFact's metrics: rewrites, paraphrases, neighbours, free generation.

    Each mean comes with its 95 % interval: a bootstrap over records.
    """
    with one_line_errors():
        if per_record is not None:
            check_new(per_record, force)
        from unified_edit.edits import read_records
        from unified_edit.errors import UnifiedEditError
        from unified_edit.evaluate.counterfact import evaluate_counterfact
        from unified_edit.evaluate.generations import Sampling, read_references
        from unified_edit.model.frames import PLAIN, chat_frame

        if references is not None and entropy is None:
            raise UnifiedEditError(
                "--references are compared with sampled texts; add --entropy 100"
            )
        chosen = read_records(records)[:limit]
        known = None if references is None else read_references(references)
        before, after = before_and_after(
            model,
            update,
            dtype,
            device,
            lambda loaded, tokenizer: evaluate_counterfact(
                loaded,
                tokenizer,
                chosen,
                generations=not no_generations,
                sampling=None if entropy is None else Sampling(entropy, seed=seed),
                references=known,
                frame=chat_frame(tokenizer) if chat else PLAIN,
                progress=True,
            ),
        )
        show_scores(before, after, per_record, as_json)


@evaluate.command()
def zsre(
    model: Model,
    file: Annotated[Path, typer.Argument(help="zsRE's evaluation set, MEND's form.")],
    update: Update = None,
    limit: Limit = None,
    answer: Annotated[
        str,
        typer.Option(
            help="The field of the new answer: alt, which `edit` reads, or answers "
            "(ROME's and MEMIT's tables)."
        ),
    ] = "alt",
    per_record: PerRecord = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """zsRE's metrics: shares of right tokens, teacher-forced.

    Specificity is about gold answers, which an unedited model seldom gives; agreement
    is with the unedited model. Each mean comes with its 95 % interval.
    """
    with one_line_errors():
        if per_record is not None:
            check_new(per_record, force)
        from unified_edit.evaluate.zsre import evaluate_zsre, read_zsre

        chosen = read_zsre(file, answer)[:limit]  # type: ignore[arg-type]  # it checks
        before, after = before_and_after(
            model,
            update,
            dtype,
            device,
            lambda loaded, tokenizer: evaluate_zsre(
                loaded, tokenizer, chosen, progress=True
            ),
        )
        if after is not None:
            after = after.compared(before)
        show_scores(before, after, per_record, as_json)


def before_and_after(
    model: str,
    update: Path | None,
    dtype: str,
    device: str,
    scores: Callable[[nn.Module, Any], Scores],
) -> tuple[Scores, Scores | None]:
    """What `scores(model, tokenizer)` gives without and, if there is one, with an
    update."""
    from unified_edit.algebra.update import UpdateSet
    from unified_edit.live import applied
    from unified_edit.loading import Source

    change = None if update is None else UpdateSet.load(update)
    loaded, tokenizer = Source.of(model).load(dtype, device)
    after = None
    if change is not None:
        # First, so that an update that does not fit is refused at once.
        with applied(loaded, change):
            after = scores(loaded, tokenizer)
    return scores(loaded, tokenizer), after


def show_scores(
    before: MeanScores[Any],
    after: MeanScores[Any] | None,
    per_record: Path | None,
    as_json: bool,
) -> None:
    """Means and intervals on stdout, and each record's scores in a file if wanted."""
    from unified_edit.display import metric_table

    count = len(before.records)
    if per_record is not None:
        rows = zip(
            before.per_record(),
            after.per_record() if after else [None] * count,
            strict=True,
        )
        write_lines(per_record, ({"before": b, "after": a} for b, a in rows))
    was = before.intervals()
    now = after.intervals() if after else None
    show(
        {
            "records": count,
            "before": before.as_dict(),
            "after": after.as_dict() if after else None,
            "intervals": {
                "before": {name: each.as_list() for name, each in was.items()},
                "after": now and {name: each.as_list() for name, each in now.items()},
            },
        },
        as_json,
        lambda: [metric_table(was, now), f"records: {count}"],
    )
