"""A game that two players play by saying something, an engine that says what it is told, and samplers and tokenizers for them."""

from lmrl.engines.base import Completion, Engine
from lmrl.environments.games import Game
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import NimTask
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Match, Task
from lmrl.trajectories.render import Renderer

LETTERS = "0123456789 left:pabcx!"


class Echo(Game):
    """Each player hears what the other said last. A move earns the mover 1, and the other .25; `x` ends it, `!` raises."""

    players = ("random",)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.said = ["", ""]
        return {"columns": {"seed": seed}}

    def observe(self, player):
        return f"p{player}:{self.said[1 - player]}"

    def step(self, action):
        mover, self.to_move = self.to_move, 1 - self.to_move
        if action == "!":
            raise RuntimeError("exclaimed")
        self.said[mover] = action
        return [1.0 if player == mover else 0.25 for player in (0, 1)], action == "x", False, {"metrics": {"moves": 1}}

    def act(self, player, rng):
        return "c"


class Says(Engine):
    """Says the text that `choose` gives for a context; remembers the contexts of each batch."""

    def __init__(self, tokenizer, choose):
        super().__init__(None)
        self.tokenizer, self.choose, self.batches = tokenizer, choose, []

    def sample(self, prompts, sampling, keys):
        contexts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in prompts]
        self.batches.append(contexts)
        return [self._completion(self.choose(context)) for context in contexts]

    def _completion(self, text):
        tokens = [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        return Completion(tokens, [-0.5] * len(tokens), "eos")


class Silent(Echo):
    players = ()


def sampler_of(tokenizer, choose, party=None, make=Echo, max_turns=3, **options):
    task = Task(make, Renderer(tokenizer), None, None, max_turns, match=Match(2, party), max_failed=1, **options)
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    return Sampler(task, Says(tokenizer, choose), decode)


def nim(**options):
    return NimTask(environment="nim", sticks=7, **options)


def letters():
    return build_tokenizer("char", [LETTERS])
