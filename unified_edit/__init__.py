"""Closed-form locate-and-edit for language models.

Edits in, a verified rank-k update out, written into a checkpoint and taken back at
will. Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified_edit.algebra.objective import (
        Equality,
        LeastSquares,
        NullSpace,
        Objective,
        PreviousKeys,
        Ridge,
        SecondMoment,
        Slack,
    )
    from unified_edit.algebra.regularize import Regularizer
    from unified_edit.algebra.solve import Certificate, Solution, factorize, solve
    from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
    from unified_edit.baselines.fine_tune import FineTuneSettings, fine_tune
    from unified_edit.baselines.lora_tuning import LoraSettings, lora_tune
    from unified_edit.baselines.mend import Mend, MendSettings
    from unified_edit.baselines.mend_training import TrainingSettings, train_mend
    from unified_edit.checkpoint.lora import export_lora
    from unified_edit.checkpoint.lora_import import import_lora
    from unified_edit.checkpoint.patch import history, patch, recover, revert, verify
    from unified_edit.edits import (
        Edit,
        Record,
        check_edits,
        edits_of,
        read_edits,
        read_records,
    )
    from unified_edit.engine import EditResult, edit
    from unified_edit.evaluate.counterfact import (
        CounterFactScores,
        evaluate_counterfact,
    )
    from unified_edit.evaluate.effects import AverageEffects, average_effects
    from unified_edit.evaluate.generations import Sampling, read_references
    from unified_edit.evaluate.layer_probe import LayerChoice, recommend
    from unified_edit.evaluate.report import write_report
    from unified_edit.evaluate.sequential import Plan, Probes, run_sequence
    from unified_edit.evaluate.tasks import evaluate_tasks
    from unified_edit.evaluate.zsre import ZsreScores, evaluate_zsre, read_zsre
    from unified_edit.facts import read_facts
    from unified_edit.guard import Guard, Readings
    from unified_edit.hparams import HparamsFile, read_hparams
    from unified_edit.ledger import Ledger
    from unified_edit.ledger_rebuild import rebuild
    from unified_edit.live import Applied, applied, apply
    from unified_edit.model.descent import Targets, TargetSettings
    from unified_edit.model.frames import Frame, chat_frame
    from unified_edit.model.perplexity import Canary
    from unified_edit.model.prompts import Contexts, ContextSettings
    from unified_edit.model.tracing import Trace, Traces, TraceSettings, trace
    from unified_edit.preparation import Prepared, prepare
    from unified_edit.recipes import (
        Recipe,
        alphaedit,
        emmet,
        emmet_seq,
        encore,
        in_chat,
        memit,
        memit_seq,
        p_rome,
        r_rome,
        recipe,
        rome,
        rome_original,
    )
    from unified_edit.report import EditReport
    from unified_edit.session import EditSession
    from unified_edit.session_state import SequenceState, Step
    from unified_edit.target_cache import TargetCache

_HOMES = {
    "algebra.objective": (
        "Equality LeastSquares NullSpace Objective PreviousKeys Ridge SecondMoment "
        "Slack"
    ),
    "algebra.regularize": "Regularizer",
    "algebra.solve": "Certificate Solution factorize solve",
    "algebra.update": "RankKUpdate UpdateSet WeightAddress",
    "baselines.fine_tune": "FineTuneSettings fine_tune",
    "baselines.lora_tuning": "LoraSettings lora_tune",
    "baselines.mend": "Mend MendSettings",
    "baselines.mend_training": "TrainingSettings train_mend",
    "checkpoint.lora": "export_lora",
    "checkpoint.lora_import": "import_lora",
    "checkpoint.patch": "history patch recover revert verify",
    "edits": "Edit Record check_edits edits_of read_edits read_records",
    "engine": "EditResult edit",
    "evaluate.counterfact": "CounterFactScores evaluate_counterfact",
    "evaluate.effects": "AverageEffects average_effects",
    "evaluate.generations": "Sampling read_references",
    "evaluate.layer_probe": "LayerChoice recommend",
    "evaluate.report": "write_report",
    "evaluate.sequential": "Plan Probes run_sequence",
    "evaluate.tasks": "evaluate_tasks",
    "evaluate.zsre": "ZsreScores evaluate_zsre read_zsre",
    "facts": "read_facts",
    "guard": "Guard Readings",
    "hparams": "HparamsFile read_hparams",
    "ledger": "Ledger",
    "ledger_rebuild": "rebuild",
    "live": "Applied applied apply",
    "model.descent": "TargetSettings Targets",
    "model.frames": "Frame chat_frame",
    "model.perplexity": "Canary",
    "model.prompts": "ContextSettings Contexts",
    "model.tracing": "Trace TraceSettings Traces trace",
    "preparation": "Prepared prepare",
    "recipes": (
        "Recipe alphaedit emmet emmet_seq encore in_chat memit memit_seq p_rome r_rome "
        "recipe rome rome_original"
    ),
    "report": "EditReport",
    "session": "EditSession",
    "session_state": "SequenceState Step",
    "target_cache": "TargetCache",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Applied",
    "AverageEffects",
    "Canary",
    "Certificate",
    "ContextSettings",
    "Contexts",
    "CounterFactScores",
    "Edit",
    "EditReport",
    "EditResult",
    "EditSession",
    "Equality",
    "FineTuneSettings",
    "Frame",
    "Guard",
    "HparamsFile",
    "LayerChoice",
    "LeastSquares",
    "Ledger",
    "LoraSettings",
    "Mend",
    "MendSettings",
    "NullSpace",
    "Objective",
    "Plan",
    "Prepared",
    "PreviousKeys",
    "Probes",
    "RankKUpdate",
    "Readings",
    "Recipe",
    "Record",
    "Regularizer",
    "Ridge",
    "Sampling",
    "SecondMoment",
    "SequenceState",
    "Slack",
    "Solution",
    "Step",
    "TargetCache",
    "TargetSettings",
    "Targets",
    "Trace",
    "TraceSettings",
    "Traces",
    "TrainingSettings",
    "UpdateSet",
    "WeightAddress",
    "ZsreScores",
    "alphaedit",
    "applied",
    "apply",
    "average_effects",
    "chat_frame",
    "check_edits",
    "edit",
    "edits_of",
    "emmet",
    "emmet_seq",
    "encore",
    "evaluate_counterfact",
    "evaluate_tasks",
    "evaluate_zsre",
    "export_lora",
    "factorize",
    "fine_tune",
    "history",
    "import_lora",
    "in_chat",
    "lora_tune",
    "memit",
    "memit_seq",
    "p_rome",
    "patch",
    "prepare",
    "r_rome",
    "read_edits",
    "read_facts",
    "read_hparams",
    "read_records",
    "read_references",
    "read_zsre",
    "rebuild",
    "recipe",
    "recommend",
    "recover",
    "revert",
    "rome",
    "rome_original",
    "run_sequence",
    "solve",
    "trace",
    "train_mend",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
