"""Every error that gemsmith raises on purpose.

    GemsmithError
    ├── ConfigError     a config.json, preset or option that is wrong or contradicts itself
    ├── WeightsError    a checkpoint file that is damaged, incomplete or belongs elsewhere
    ├── HubError        a checkpoint that cannot be found or fetched
    ├── CapacityError   more memory or context than there is
    │   └── QueueFullError  more requests wait than may; the same request can be served later
    ├── TokenizerError  a vocabulary file that cannot be read
    ├── RequestError    messages, sampling parameters or prompts that cannot be served
    │   ├── MediaError     an image, sound or video that cannot be read or that the model lacks
    │   ├── TemplateError  a checkpoint's own chat template failed, ran too long or said no
    │   └── ToolError      a tool declaration, schema or argument list that cannot be expressed
    └── TrainError      training data or a run that cannot be resumed

The text of each names the value given, what is allowed, and the way out. The command line prints
that text alone; `--debug` brings the traceback back.
"""


class GemsmithError(Exception):
    """Root of the tree: everything the user can be expected to put right."""


class ConfigError(GemsmithError, ValueError):
    """A configuration is wrong or contradicts itself."""


class WeightsError(GemsmithError, ValueError):
    """A checkpoint file is damaged, incomplete, or belongs to another model."""


class HubError(GemsmithError, OSError):
    """A checkpoint cannot be found or fetched."""


class CapacityError(GemsmithError, MemoryError):
    """The request needs more memory or context than there is."""


class QueueFullError(CapacityError):
    """As many requests as may wait are waiting already."""


class TokenizerError(GemsmithError, ValueError):
    """A vocabulary cannot be read or does not fit the model."""


class RequestError(GemsmithError, ValueError):
    """Messages, sampling parameters or a prompt cannot be served."""


class MediaError(RequestError):
    """An image, sound or video cannot be read, is too large, or the model has no input for it."""


class TemplateError(RequestError):
    """A checkpoint's own chat template failed, ran too long, or refused the messages."""


class ToolError(RequestError):
    """A tool declaration, schema or argument list cannot be expressed."""


class TrainError(GemsmithError, RuntimeError):
    """Training data are unusable or a run cannot be resumed."""
