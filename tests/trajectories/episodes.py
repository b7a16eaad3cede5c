"""Rows as episodes with their tokens."""

from lmrl.trajectories.rows import fingerprint, parse, render


def from_row(row, renderer, history="all", number=0):
    return [render(one, renderer, history) for one in parse(row, number, fingerprint(renderer.tokenizer))]
