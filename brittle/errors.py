"""Named errors: each says the rule, the value found and the remedy, in one line.

Every error carries the exit status that the command line ends with. Check at the door, trust inside.
"""


class BrittleError(Exception):
    """Base of all errors that are not our bug."""

    exit_status = 3


class UsageError(BrittleError):
    """A command, option or spec that cannot be understood."""

    exit_status = 2


class SubjectError(BrittleError):
    """The user's model or data does not do what an audit needs."""


class DataError(SubjectError):
    """Inputs, labels or ids that break a rule: bounds, range, shape, emptiness."""


class ModelError(SubjectError):
    """A model that raises, returns the wrong thing, or is in the wrong mode."""


class NotFiniteError(SubjectError):
    """A NaN or an infinity in weights, loss, logits or gradients."""


class UnsupportedError(SubjectError):
    """A training feature that the path kernel cannot account for exactly, refused by name."""


class PathMismatchError(SubjectError):
    """A recorded path that belongs to another model, other data or another loss."""


class DamagedFileError(BrittleError):
    """A file whose checksum or schema does not hold."""

    exit_status = 4


class RunFolderError(UsageError):
    """A run folder that belongs to another audit."""


class SealedError(UsageError):
    """A sealed label that was asked for before predictions were fixed, or twice."""


class DiskError(BrittleError):
    """The disk is full or cannot be written."""


class OutOfMemoryError(BrittleError):
    """What cannot be cut any smaller does not fit into memory."""


class SkippedError(BrittleError):
    """Too many inputs had to be skipped for the result to mean anything."""

    exit_status = 5
