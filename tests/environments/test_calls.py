"""Calls of environments explain themselves."""

import pytest

from lmrl.environments.calls import begin_episode


class OldReset:
    def reset(self, seed=None):
        return "start", {}


class Broken:
    def reset(self, *, seed=None, options=None):
        return len(None)


def test_a_reset_without_gymnasiums_arguments_is_told_of_them():
    with pytest.raises(TypeError, match=r"reset\(seed=None\) must take .*reset\(self, \*, seed=None, options=None\)"):
        begin_episode(OldReset(), 1, None)


def test_other_type_errors_stay_as_they_are():
    with pytest.raises(TypeError, match="object of type 'NoneType' has no len"):
        begin_episode(Broken(), 1, None)
