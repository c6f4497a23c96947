"""What can be wrong with a checkpoint, each a one-line error of the user's to mend."""

from megatron_zebra.errors import UserError


class CheckpointError(UserError):
    """Something about a checkpoint folder that stops a save or a load."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, cut, or does not match its checksum."""


class OtherFormat(CheckpointError):
    """A sound checkpoint of a format version that this program does not read; never passed over as if it were damaged."""


class IncompleteCheckpoint(CheckpointError):
    """The pieces do not cover a tensor exactly once, or a tensor is not there at all."""


class NotTaken(CheckpointError):
    """The storage takes no checkpoint now, and may take a later one; whatever this save had written is gone again."""


class DiskFull(NotTaken):
    """There is no room for a checkpoint."""
