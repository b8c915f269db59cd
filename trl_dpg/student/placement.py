"""Where the student is: on a device in a reward step, and in host memory between two of them if that is asked for."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from transformers.utils import logging

from .student import Student


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Placement:
    """
    Where the student works, and where it waits.

    Args:
        device (`str`, *optional*, defaults to `"auto"`):
            Where it works: the process's own device (`"auto"`), `"cpu"`, or a device such as `"cuda:1"`.
        offload (`bool`, *optional*, defaults to `False`):
            Whether it waits in host memory.

    Raises:
        `ValueError`: If the device has no such form, or if an offloaded student works in host memory anyway.
    """

    device: str = "auto"
    offload: bool = False

    def __post_init__(self):
        if self.device == "auto":
            return
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = "meta"
        if kind == "meta":
            raise ValueError(
                f"student_device must be 'auto', 'cpu' or a device such as 'cuda:1', got {self.device!r}."
            )
        if kind == "cpu" and self.offload:
            raise ValueError(
                f"student_offload moves the student into host memory between reward steps, but with student_device="
                f"{self.device!r} it is always there. Leave out one of them."
            )

    def where(self) -> torch.device:
        """
        The device on which the student works.

        Raises:
            `ValueError`: If this machine has no such device, or if all processes would use a single one.
        """
        own = PartialState().device
        if own.type == "cpu":  # of several processes "cpu:1", to which a tensor on "cpu" would be copied every time
            own = torch.device("cpu")
        if self.device == "auto":
            return own
        device = torch.device(self.device)
        if device.type == "cpu":
            return device
        accelerator = torch.accelerator.current_accelerator()
        number = torch.accelerator.device_count() if accelerator is not None and accelerator.type == device.type else 0
        if (device.index or 0) >= number:
            raise ValueError(
                f"student_device={self.device!r}, but this machine has {number or 'no'} {device.type} "
                f"device{'s' * (number != 1)}. Use 'auto' or 'cpu'."
            )
        if device.index is None:
            return own if own.type == device.type else torch.device(device.type, 0)
        if PartialState().num_processes > 1:
            raise ValueError(
                f"student_device={self.device!r} would put the students of all {PartialState().num_processes} "
                "processes on one device. Use 'auto', the own device of each process, or 'cpu'."
            )
        return device

    def checked(self) -> "Placement":
        """This placement. If the machine has no such device, an error is raised, see `where`."""
        if self.device != "auto":
            self.where()
        return self

    def move_in(self, student: Student) -> None:
        """Move the student to where it works. An offloaded student on a machine without GPU gets a warning."""
        device = self.where()
        if self.offload and device.type == "cpu":
            logger.warning_once("student_offload has no effect: the student works on the CPU, in host memory.")
        if device.type != student.device.type or device.index not in (None, student.device.index):
            student.to(device)

    def move_out(self, student: Student) -> None:
        """Move the student to where it waits, and give its memory back to the other users of the GPU."""
        device = student.device
        if self.offload and device.type != "cpu":
            student.to("cpu")
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.empty_cache()
