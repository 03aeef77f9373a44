"""Spectrograms as pictures, so that what sites kept or merged is drawn over them as over an image (``tpcompile.report.patchview``)."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

QUIET, LOUD = (18, 14, 52), (255, 232, 128)
"""Colours of the lowest and of the highest value; between them there is a straight line."""


def picture(inputs: Mapping[str, NDArray[np.generic]]) -> Picture | None:
    """The spectrogram among a sample's inputs, time from left to right, the band of lowest frequency on top, as patches are numbered.

    Args:
        inputs: by name; a spectrogram is the only input, float ``[1, T, F]`` or ``[1, F, T]`` with more frames than bands.

    Returns:
        uint8 ``[F, T, 3]``; None where the sample is no spectrogram.
    """
    values = next(iter(inputs.values())) if len(inputs) == 1 else None
    if values is None or values.ndim != 3 or values.shape[0] != 1 or not np.issubdtype(values.dtype, np.floating):
        return None
    bands = values[0] if values.shape[1] <= values.shape[2] else values[0].T
    low, high = float(bands.min()), float(bands.max())
    share = (bands.astype(np.float64) - low) / ((high - low) or 1.0)
    colours = np.array(QUIET) + share[..., None] * (np.array(LOUD) - np.array(QUIET))
    drawn: Picture = np.rint(colours).astype(np.uint8)
    return drawn
