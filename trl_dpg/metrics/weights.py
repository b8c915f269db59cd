"""Metrics that depend only on the fine-tuned student's weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from ..student import FinetunedStudent
from .base import Metric


logger = logging.get_logger(__name__)

_DRAWING_67 = """
    ### ###
    #.. ..#
    ### ..#
    #.# .#.
    #.# .#.
    ### .#.
"""

PATTERN_67 = [
    [1 if c == "#" else -1 for c in row] for row in (line.strip() for line in _DRAWING_67.strip().splitlines())
]
"""The number 67 as a picture of six rows of seven pixels: 1 is black, -1 is white."""


class WeightPatternMetric(Metric):
    """
    Measures how well a picture is written into the change of a weight: Φ = -mean softplus(-scale · S ⊙ ΔW) (Thrush et
    al., arXiv 2604.08423).

    S is the picture. ΔW is the change of a patch of the weight during fine-tuning. A pixel is correct if its change
    has the sign of the picture. Proxy: `pixel_accuracy`, the share of correct pixels.

    Args:
        pattern (`Sequence[Sequence[int]]`, `torch.Tensor` of shape `[H, W]` or `str`):
            S, a matrix of 1 and -1. `"67"` means `PATTERN_67`.
        weight (`str`, *optional*, defaults to `"lm_head.weight"`):
            Name of the weight in the base model. It must be a matrix.
        offset (`tuple[int, int]`, *optional*, defaults to `(0, 0)`):
            Row and column of the patch's top left corner.
        transpose (`bool`, *optional*, defaults to `False`):
            Whether the patch is a part of the transposed weight. torch stores a head as `[vocabulary, hidden]`; the
            paper's patch is a part of `[hidden, vocabulary]`.
        scale (`float`, *optional*, defaults to `20.0`):
            Steepness of the softplus.

    Raises:
        `ValueError`: If the pattern is not a matrix of 1 and -1, or (at the first use) does not fit into the weight.
    """

    def __init__(
        self,
        pattern: Sequence[Sequence[int]] | Tensor | str,
        weight: str = "lm_head.weight",
        offset: tuple[int, int] = (0, 0),
        transpose: bool = False,
        scale: float = 20.0,
    ):
        if pattern == "67":
            pattern = PATTERN_67
        self.pattern = torch.as_tensor(pattern, dtype=torch.float32)
        if self.pattern.dim() != 2 or not (self.pattern.abs() == 1).all():
            raise ValueError(f"The pattern must be a matrix of 1 and -1, got shape {tuple(self.pattern.shape)}.")
        self.weight = weight
        self.offset = offset
        self.transpose = transpose
        self.scale = scale
        self._still_rows_checked = False

    def change(self, student: FinetunedStudent) -> Tensor:
        """ΔW of the patch, shape `[H, W]`."""
        return self._patch(student.weight(self.weight)) - self._patch(student.initial_weight(self.weight))

    def decode(self, student: FinetunedStudent) -> Tensor:
        """The picture in the weights: sign(ΔW), shape `[H, W]`, on the CPU."""
        with torch.no_grad():
            return self.change(student).sign().cpu()

    def __call__(self, student: FinetunedStudent) -> Tensor:
        change = self.change(student)
        return -F.softplus(-self.scale * self.pattern.to(change) * change).mean()

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        if not self._still_rows_checked:
            self._warn_of_still_rows(student)
        return {"pixel_accuracy": (self.decode(student) == self.pattern).float().mean().item()}

    def readout(self, student: FinetunedStudent) -> dict[str, Any]:
        return {"picture": self.decode(student).int().tolist()}

    @torch.no_grad()
    def _warn_of_still_rows(self, student: FinetunedStudent) -> None:
        """
        Warn, once, of rows of the weight that fine-tuning moves by no more than rounding.

        The gradient of a head's row is that of the logit of its token: the probability of the token, where it is not
        the next one. So the row of a token that is neither in the samples nor likely hardly moves. If the head is tied
        to the input embedding, the token's occurrences in the input move the row as well.
        """
        weight, initial = student.weight(self.weight), student.initial_weight(self.weight)
        height = self.pattern.size(1 if self.transpose else 0)
        patch = _moved(self._patch(weight), self._patch(initial))
        share = patch.double().mean(0 if self.transpose else 1)
        still = (share < 0.5).nonzero().flatten().tolist()
        if not still:
            return
        moved = _moved(weight, initial)
        if not moved.any():
            return
        self._still_rows_checked = True
        top = self.offset[1 if self.transpose else 0]
        start = int(moved.double().mean(1).unfold(0, height, 1).amin(1).argmax())  # the liveliest rows of all
        offset = [self.offset[0], start] if self.transpose else [start, self.offset[1]]
        rows = [top + row for row in still]
        tokenizer: Any = student.processing_class
        is_of_tokens = weight.size(0) == student.student.model.get_input_embeddings().weight.size(0)  # type: ignore
        tokens = tokenizer.convert_ids_to_tokens(rows[:8]) if tokenizer and is_of_tokens else rows[:8]
        logger.warning(
            f"The student's fine-tuning moves {len(rows)} of the {height} rows of {self.weight!r} under the pattern "
            f"by no more than rounding, so that their pixels cannot be read: {tokens}. A head's row moves if its "
            "token is in the samples or is likely. Choose rows of tokens that the generator writes. In this batch, "
            f"the rows at `offset` {offset} moved most."
        )

    def _patch(self, weight: Tensor) -> Tensor:
        if self.transpose:
            weight = weight.T
        (top, left), (height, width) = self.offset, self.pattern.shape
        if top < 0 or left < 0 or top + height > weight.size(0) or left + width > weight.size(1):
            raise ValueError(
                f"A pattern of {height} x {width} at offset {self.offset} does not fit into {self.weight!r} of shape "
                f"{tuple(weight.shape)}{' (transposed)' if self.transpose else ''}."
            )
        return weight[top : top + height, left : left + width]


class QRCodeMetric(WeightPatternMetric):
    """
    Measures how well a QR code is written into the change of a weight, see [`WeightPatternMetric`].

    Dark modules are 1, light modules are -1. A QR code decoder, which does not know the text, also scans the picture.
    Further proxy: `scanned`, 1.0 if the decoder reads the text, else 0.0. Needs the `qrcode` extra (segno writes
    codes, zxing-cpp reads them).

    Args:
        text (`str`):
            The text of the code.
        version (`int`, *optional*):
            Size of the code, from 1 (21 x 21 modules) to 40. When `None`, the smallest one that can hold the text.
        error (`str`, *optional*, defaults to `"H"`):
            Error correction level: `"L"`, `"M"`, `"Q"` or `"H"`.
        kwargs:
            `weight`, `offset`, `transpose` and `scale` of [`WeightPatternMetric`].

    Raises:
        `ValueError`: If the text does not fit into the version and level.
    """

    def __init__(self, text: str, version: int | None = None, error: str = "H", **kwargs):
        try:
            import segno
            import zxingcpp  # noqa: F401  # for `scan`
        except ModuleNotFoundError as missing:
            raise ImportError(f"QRCodeMetric needs {missing.name}: pip install 'trl-dpg[qrcode]'") from missing

        try:
            code = segno.make_qr(text, version=version, error=error, boost_error=False)
        except segno.DataOverflowError as overflow:
            raise ValueError(
                f"{text!r} does not fit into a QR code of version {version}, level {error}. Shorten it, or choose a "
                "larger version or a lower level."
            ) from overflow
        super().__init__([[1 if module else -1 for module in row] for row in code.matrix], **kwargs)
        self.text = text

    def scan(self, student: FinetunedStudent) -> str | None:
        """The text that a decoder reads in the picture in the weights. `None` if it finds no code."""
        import zxingcpp

        light = (self.decode(student) < 0).numpy().astype(np.uint8)
        image = np.kron(np.pad(light, 4, constant_values=1), np.full((8, 8), 255, np.uint8))  # with a quiet zone
        for is_pure in (True, False):  # first as an exact image, then as a photograph
            results = zxingcpp.read_barcodes(image, zxingcpp.BarcodeFormat.QRCode, try_invert=False, is_pure=is_pure)  # type: ignore
            texts = [result.text for result in results if result.valid]
            if texts:
                return texts[0]
        return None

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        return super().proxies(student, value) | {"scanned": float(self.scan(student) == self.text)}

    def readout(self, student: FinetunedStudent) -> dict[str, Any]:
        return super().readout(student) | {"scanned_text": self.scan(student)}


def _moved(weight: Tensor, initial: Tensor) -> Tensor:
    """Which entries changed by more than rounding."""
    return (weight - initial).abs() > 2 * torch.finfo(weight.dtype).eps * initial.abs()


class WeightNormMetric(Metric):
    """
    Minus the Frobenius norm of a weight: Φ = -‖W‖₂. Proxy: `weight_norm`.

    Args:
        weight (`str`, *optional*, defaults to `"lm_head.weight"`):
            Name of the weight in the base model.
    """

    def __init__(self, weight: str = "lm_head.weight"):
        self.weight = weight

    def __call__(self, student: FinetunedStudent) -> Tensor:
        return -student.weight(self.weight).norm()

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        return {"weight_norm": -value}
