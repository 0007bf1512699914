"""Find the arguments of a constructor, so that a base class saves those of its subclasses as hyperparameters."""

from __future__ import annotations

import sys
from types import FrameType


def constructor_frame(instance: object) -> FrameType:
    """Return the frame of the outermost ``__init__`` that is constructing an object, for `save_hyperparameters`.

    Call it from the ``__init__`` of a base class. If Lightning searched for the frame itself, it would leave a
    reference cycle, which keeps data loaders alive.

    Args:
        instance: the object under construction.
    """
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        if caller.f_code.co_name != "__init__" or caller.f_locals.get("self") is not instance:
            break
        frame = caller
    return frame
