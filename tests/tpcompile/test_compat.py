"""What the packages are worked around with; ``tests/models/test_compat.py`` has torchvision."""

import gc
import weakref

from tpcompile.compat import settled


class Ring:
    """An object that only the collector frees."""

    def __init__(self) -> None:
        self.self = self


def test_the_collector_is_spared_what_was_there_and_frees_what_is_new() -> None:
    old = gc.get_freeze_count()
    with settled():
        assert gc.get_freeze_count() > 10_000
        during = weakref.ref(Ring())
        gc.collect()
        assert during() is None
    assert gc.get_freeze_count() == old == 0


def test_a_caller_who_froze_objects_keeps_them() -> None:
    gc.freeze()
    try:
        with settled():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
