"""How much a score server takes, and how long it waits. Its command knows it without the packages of the server."""

from dataclasses import dataclass, field, fields


@dataclass
class Limits:
    """
    How much the server takes, and how long it waits.

    Args:
        max_request_bytes (`int`, *optional*, defaults to 64 MiB):
            Bytes of a request's body.
        max_samples (`int`, *optional*, defaults to `65536`):
            Samples of a dataset.
        max_text_length (`int`, *optional*, defaults to `1000000`):
            Characters of a sample. Messages count as the JSON that they are.
        max_waiting (`int`, *optional*, defaults to `4`):
            Complete datasets that wait while another is scored.
        dataset_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds without a new sample after which an incomplete dataset is given up.
        poll_timeout (`float`, *optional*, defaults to `30.0`):
            Seconds that a request waits for its dataset, at most.
        keep (`float`, *optional*, defaults to `600.0`):
            Seconds for which the end of a dataset is kept: its scores, or why there are none.
    """

    max_request_bytes: int = field(default=64 * 2**20, metadata={"help": "Bytes of a request, at most."})
    max_samples: int = field(default=65536, metadata={"help": "Samples of a dataset, at most."})
    max_text_length: int = field(default=1_000_000, metadata={"help": "Characters of a sample, at most."})
    max_waiting: int = field(default=4, metadata={"help": "Complete datasets that wait for their turn, at most."})
    dataset_timeout: float = field(
        default=600.0, metadata={"help": "Seconds without a new sample after which a dataset is given up."}
    )
    poll_timeout: float = field(default=30.0, metadata={"help": "Seconds that a request waits for scores, at most."})
    keep: float = field(default=600.0, metadata={"help": "Seconds for which the scores of a dataset are kept."})

    def __post_init__(self):
        for name in (own.name for own in fields(Limits)):
            least, value = int(name != "max_waiting"), vars(self)[name]
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")

    @property
    def max_held_bytes(self) -> int:
        """Bytes of all datasets that are not finished."""
        return 16 * self.max_request_bytes
