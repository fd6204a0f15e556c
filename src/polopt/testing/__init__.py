"""Tests for methods of your own: `check_method` runs the battery that every method of the library passes.

    from polopt.testing import check_method

    def test_my_method() -> None:
        check_method("my_method")            # a recipe, a Method, or a part

`random_batch`, `TinyActor` and the hypothesis strategy `batches` give the data to write further tests with.
"""

from polopt.testing.battery import Report, Result, check_method
from polopt.testing.data import TinyActor, batches, random_batch

__all__ = ["Report", "Result", "TinyActor", "batches", "check_method", "random_batch"]
