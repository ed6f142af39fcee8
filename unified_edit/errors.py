"""The exceptions users meet. Each message names what is wrong, what was expected
and what to do."""


class UnifiedEditError(Exception):
    """Base of every error this package raises on purpose."""


class EditError(UnifiedEditError, ValueError):
    """An edit, or a set of edits, is malformed or contradicts itself."""


class PromptError(EditError):
    """A prompt cannot be tokenized as an edit needs it (subject, target, length)."""


class RecipeError(UnifiedEditError, ValueError):
    """A recipe's settings do not fit each other, the model or the edits."""


class UnsupportedModel(UnifiedEditError):
    """The architecture or its storage (quantized, mixture of experts) is refused."""


class NonFiniteError(UnifiedEditError, ArithmeticError):
    """A NaN or an infinity where a finite number is needed."""


class IllConditioned(UnifiedEditError, ArithmeticError):
    """A matrix that must be positive definite is not, even with jitter."""


class InfeasibleEdits(UnifiedEditError, ArithmeticError):
    """Equality constraints that cannot all hold.

    Attributes:
        edits: indices of the edits that conflict.
    """

    def __init__(self, message: str, edits: tuple[int, ...]) -> None:
        super().__init__(message)
        self.edits = edits


class UpdateError(UnifiedEditError, ValueError):
    """An update file or object is malformed, or does not fit the model."""


class CheckpointError(UnifiedEditError):
    """A checkpoint folder cannot be read, patched, verified or reverted."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint is not the one that an update or a manifest was made for."""


class LedgerError(UnifiedEditError):
    """A ledger cannot be read, changed or solved."""


class SessionError(UnifiedEditError):
    """A session's file cannot be read or written, or does not fit the model."""


class EditorError(UnifiedEditError):
    """A trained editor, or how one is to be trained, is malformed or does not fit."""
