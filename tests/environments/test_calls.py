"""Calls of environments explain themselves."""

import pytest

from lmrl.environments.calls import begin_episode, call_player


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


def test_a_player_that_returns_no_text_is_refused():
    class Player:
        def act(self, player, rng):
            return "\udcff"

    with pytest.raises(UnicodeEncodeError):
        call_player(Player(), "odd", None)
