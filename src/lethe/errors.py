"""The tree of Lethe's errors.

LetheError                    exit code 1: the work could not be finished
├── ReplayError               the slice does not reproduce the model's own forward
├── DivergedError             the loss became NaN, infinite or exploded
├── OutOfMemoryError          the device has too little memory
├── SaveError                 a file could not be written
└── UsageError                exit code 2: what was asked for cannot be done as asked
    ├── UnknownNameError      no method, metric, set ... of that name
    ├── InvalidValueError     a number or choice outside its range
    │   └── InvalidLayerError a layer the model does not have, or the method cannot use
    ├── ModelError            a model folder that is missing, incomplete or refused
    │   └── UnknownModuleError  no MLP output matrix is known in this model
    ├── CorpusError           a forget or retain corpus that cannot be used
    │   └── EmptyBatchError   a batch without one counted token
    ├── QuestionError         a question file that cannot be used
    ├── PatchError            a patch that is corrupt, or does not belong to the base
    └── RunFolderError        a run folder that is missing, incomplete or of another version
"""

import dataclasses
from typing import Any, Literal, get_args, get_origin


class LetheError(Exception):
    """Anything Lethe reports to its user: what was wrong, what was found, what to do."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ReplayError(LetheError):
    """The replayed layers differ from the model's own forward, so nothing was trained."""


class DivergedError(LetheError):
    """Training left the finite numbers; the last good state was kept."""


class OutOfMemoryError(LetheError):
    """The device ran out of memory; says what to lower."""


class SaveError(LetheError):
    """A file could not be written; nothing half-written stays behind."""


class UsageError(LetheError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that nothing answers to; the message offers the nearest one."""


class InvalidValueError(UsageError):
    """A value outside its range."""


def check_choices(section: Any) -> None:
    """Raises: InvalidValueError if a field of closed choices, in a dataclass of settings, holds none of them."""
    for field in dataclasses.fields(section):
        if get_origin(field.type) is Literal and (value := getattr(section, field.name)) not in get_args(field.type):
            raise InvalidValueError(f"'{field.name}' must be one of {', '.join(get_args(field.type))}. Got {value}.")


class InvalidLayerError(InvalidValueError):
    """A layer outside the model, or one that the chosen training layers do not fit."""


class ModelError(UsageError):
    """A model that is missing, incomplete, or would need pickle or remote code."""


class UnknownModuleError(ModelError):
    """No MLP output matrix of a known name stands in the layer."""


class CorpusError(UsageError):
    """A corpus that cannot be read or used; the message names file, line and fix."""


class EmptyBatchError(CorpusError):
    """No token of the batch counts in the loss."""


class QuestionError(UsageError):
    """A question file that cannot be read or used; the message names file, line and fix."""


class PatchError(UsageError):
    """A patch that is corrupt or does not belong to the base it was applied to."""


class RunFolderError(UsageError):
    """A run folder that is missing, incomplete, busy, or written by a newer version."""
