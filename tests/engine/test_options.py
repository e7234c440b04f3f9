from typing import get_args

from step1x.engine.options import SPEEDS
from step1x.profiles import Speed


def test_speeds_are_those_of_profiles() -> None:
    assert get_args(Speed) == SPEEDS
