"""The errors a user can meet: each says what went wrong, where, what was found, what was expected and what to do."""

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "InputError",
    "MissingDependencyError",
    "PipelineError",
    "QCompilerError",
    "RecipeError",
    "ResourceError",
    "TargetError",
    "UnsupportedModelError",
    "VerificationError",
    "WeightError",
    "ZeroCoverageError",
    "did_you_mean",
]


class QCompilerError(Exception):
    """Base of every error raised on purpose.

    Args:
        what: one sentence, what went wrong.
        where: the file, tensor, node or option concerned.
        got: what was found there.
        expected: what would have been accepted.
        remedy: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for label in ("where", "got", "expected", "remedy"):
            value = getattr(self, label)
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, str | None]:
        """The error as the JSON object printed by ``--json``."""
        return {
            "type": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "got": self.got,
            "expected": self.expected,
            "remedy": self.remedy,
        }


class InputError(QCompilerError):
    """A path, text or option that cannot be used."""


class WeightError(QCompilerError):
    """A checkpoint file or tensor that is missing, damaged or not finite."""


class UnsupportedModelError(QCompilerError):
    """A model that cannot be captured as a graph."""


class RecipeError(QCompilerError):
    """An unknown recipe, scheme or option of a pass."""


class PipelineError(QCompilerError):
    """Passes in an order that cannot work."""


class CalibrationError(QCompilerError):
    """Calibration data that is too short or does not fit the model."""


class ZeroCoverageError(CalibrationError):
    """A site that calibration never reached."""


class VerificationError(QCompilerError):
    """A pass or a written file that does not do what it declares."""


class TargetError(QCompilerError):
    """Something the chosen target does not take."""


class ArtifactError(QCompilerError):
    """A saved artifact that is incomplete, damaged or of another schema."""


class MissingDependencyError(QCompilerError):
    """An optional package that is not installed."""


class ResourceError(QCompilerError):
    """Not enough memory or disk."""


def did_you_mean(got: object, known: Iterable[str]) -> str | None:
    """A remedy that names what was probably meant: nearly the same word, or one that holds it; None if nothing is near.

    Args:
        got: what was given.
        known: what would have been accepted.
    """

    def plain(word: str) -> str:
        return word.strip().lower().replace("_", "-").replace(" ", "-")

    wanted, words = plain(str(got)), {plain(word): word for word in known}
    near = [wanted] if wanted in words else difflib.get_close_matches(wanted, words, n=3, cutoff=0.7)
    if not near and len(wanted) > 2:
        near = [word for word in words if wanted in word][:3]
    return f"did you mean {' or '.join(words[word] for word in near)}?" if near else None
