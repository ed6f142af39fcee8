"""The exceptions of the statistics package. Each message names the layer, module, file
or text that is wrong, what was expected and what to do."""


class StatisticsError(Exception):
    """Base of every error this package raises on purpose."""


class CaptureError(StatisticsError, LookupError):
    """A module whose input is wanted does not exist, did not run, or ran twice."""


class CorpusError(StatisticsError, ValueError):
    """A text source, or its tokens, cannot be used as asked."""


class StatisticsMismatch(StatisticsError):
    """Statistics or a checkpoint belong to another model, tokenizer, text or setting;
    both sides are named."""


class NonFiniteActivations(StatisticsError, ArithmeticError):
    """A NaN or an infinity among the keys, or a sum of their squares that overflows.

    Attributes:
        row: the first row of the given keys that holds one; None where no single row
            is to blame.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class CorpusExhausted(UserWarning):
    """The text ended before the budget of tokens was spent."""
