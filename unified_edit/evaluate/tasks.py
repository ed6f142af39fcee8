"""Downstream tasks, by EleutherAI's lm-evaluation-harness (`lm-eval`): what an edit
does to abilities that it should leave alone.

Needs the package `lm-eval`, imported only when tasks are asked for. Whatever it says of
its own goes to stderr, and the caller's random numbers go on as if nothing had run.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from covariance_cache.capture import evaluating
from unified_edit.errors import UnifiedEditError

SEED = 1234
"""What lm-eval itself draws its examples with."""
BATCH = 8

Scores = dict[str, dict[str, float]]
"""task or group → metric → value; after a filter F of lm-eval's it is `metric,F`."""


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = BATCH,
    seed: int = SEED,
) -> Scores:
    """`TaskSet.load` and then its `scores`; to score more than once, call these."""
    chosen = TaskSet.load(tasks, include)
    return chosen.scores(
        model,
        tokenizer,
        limit=limit,
        shots=shots,
        batch_size=batch_size,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks with their data, for one model after another."""

    names: tuple[str, ...]
    """As asked for: tasks, groups and tags."""
    _loaded: dict[str, Any] = field(repr=False)
    _shots: dict[str, int | None] = field(repr=False)
    """What each task's own description says."""

    @classmethod
    def load(cls, names: Sequence[str], include: str | Path | None = None) -> TaskSet:
        """Tasks, groups or tags that lm-eval knows.

        Args:
            include: a folder of task descriptions (.yaml) beside lm-eval's own. They go
                first, and lm-eval's own, which take ten seconds and more to read, are
                left alone where the folder describes all that is asked for. As always
                with lm-eval, a description may name Python functions to run.

        Raises:
            UnifiedEditError: lm-eval is missing or too old; no task, or an unknown one;
                no such folder; one whose data cannot be loaded, that runs what the
                model writes, or that shows it more than text.
        """
        chosen = tuple(dict.fromkeys(names))
        if not chosen:
            raise UnifiedEditError("no task is named; name one or more")
        if include is not None and not Path(include).is_dir():
            raise UnifiedEditError(f"{include}: no such folder of task descriptions")
        with _aside(SEED):
            manager = _manager(chosen, include)
            with _only_errors():
                try:
                    loaded = manager.load(list(chosen))
                except Exception as error:  # Of the many libraries that read data.
                    told = " ".join(f"{error}".split()) or type(error).__name__
                    raise UnifiedEditError(
                        f"{', '.join(chosen)}: cannot be loaded: {told}"
                    ) from error
        for name, task in loaded["tasks"].items():
            for flag, what in (
                ("UNSAFE_CODE", "runs code that the model writes"),
                ("MULTIMODAL", "shows the model more than text"),
            ):
                if getattr(task, flag, False):
                    raise UnifiedEditError(f"the task {name} {what}: not supported")
        shots = {n: t.get_config("num_fewshot") for n, t in loaded["tasks"].items()}
        return cls(chosen, loaded, shots)

    def scores(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        limit: int | None = None,
        shots: int | None = None,
        batch_size: int = BATCH,
        seed: int = SEED,
    ) -> Scores:
        """Runs the tasks; the same call gives the same figures.

        Args:
            limit: use each task's first documents only.
            shots: solved examples in front of each; None for as many as the task says.
                One that says 0 itself gets none, as in lm-eval.
            batch_size: of sequences, each with logits at all its tokens.
            seed: of the examples, and of sampling where a task wants it.

        Raises:
            UnifiedEditError: a setting out of range, or lm-eval refuses one.
        """
        for name, value, least in (
            ("limit", limit, 1),
            ("shots", shots, 0),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise UnifiedEditError(f"{name} {value}: expected {least} or more")
        with evaluating(model), _aside(seed):
            evaluator, huggingface = _library("evaluator", "models.huggingface")
            with _only_errors():
                # A copy: a pad token may be made up for it.
                wrapped = huggingface.HFLM(
                    pretrained=model,
                    tokenizer=copy.deepcopy(tokenizer),
                    batch_size=batch_size,
                )
            for name, task in self._loaded["tasks"].items():
                own = self._shots[name]
                few = own if shots is None or own == 0 else shots
                task.set_config(key="num_fewshot", value=few or 0)
                task.set_fewshot_seed(seed=seed)
            try:
                # Not `simple_evaluate`, which loads the tasks each time and describes
                # the machine for seconds; the loop above is what it does to tasks.
                found = evaluator.evaluate(
                    lm=wrapped,
                    task_dict=self._loaded,
                    limit=limit,
                    log_samples=False,
                    bootstrap_iters=0,
                )
            except (AssertionError, ValueError) as error:  # Its ways to refuse.
                raise UnifiedEditError(f"lm-eval: {error}") from error
        scores = {name: _figures(row) for name, row in found["results"].items()}
        return {name: figures for name, figures in scores.items() if figures}


def _manager(names: Sequence[str], include: str | Path | None) -> Any:
    """lm-eval's index of tasks, which has all the names."""
    (tasks,) = _library("tasks")
    folder = None if include is None else str(include)
    if folder is not None:
        local = tasks.TaskManager(include_path=folder, include_defaults=False)
        # Groups may take in tasks of lm-eval's own.
        if set(names) <= {*local.all_subtasks, *local.all_tags}:
            return local
    manager = tasks.TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, manager.all_tasks)
            raise UnifiedEditError(
                f"lm-eval knows no task {name!r}"
                + (f"; near it are {', '.join(near)}" if near else "")
                + ("" if folder is None else f" (nor is it described in {folder})")
            )
    return manager


def _library(*names: str) -> tuple[Any, ...]:
    """Modules of lm-eval."""
    wanted = "needs the package lm-eval, version 0.4.12 or later"
    install = "pip install 'unified-edit[tasks]'"
    try:
        if not hasattr(importlib.import_module("lm_eval.tasks").TaskManager, "load"):
            raise ImportError("this one is older")
        return tuple(importlib.import_module(f"lm_eval.{name}") for name in names)
    except ImportError as error:
        raise UnifiedEditError(f"tasks: {wanted} ({error}): {install}") from error


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in what lm-eval reports of a task: `acc,none` is plain acc."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in row.items()
        if "," in key and isinstance(value, (int, float))
    }


@contextmanager
def _aside(seed: int) -> Iterator[None]:
    """Random numbers from a seed, and stdout to stderr; the caller's are put back."""
    states = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices), redirect_stdout(sys.stderr):
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextmanager
def _only_errors() -> Iterator[None]:
    """Hides lm-eval's advice to those who write tasks or start it otherwise."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
