"""An extra metric, and a message when it exceeds a limit."""

from lmrl import Listener


class LengthLog(Listener):
    """Records the longest completion of each step, `longest`, and says so once it has more than `limit` tokens."""

    name = "length_log"

    def __init__(self, limit: int = 100):
        self.limit, self.said = limit, False

    def measure(self, stage, step, source_batch, metrics):
        return {"longest": max((one.num_actions for one in source_batch.played), default=0)}

    def recorded(self, stage, step, source_batch, metrics):
        if metrics["longest"] > self.limit and not self.said:
            self.said = True
            stage.display.say(f"step {step}: a completion has {metrics['longest']} tokens, more than {self.limit}")

    def state(self):
        return {"said": self.said}

    def load_state(self, state):
        self.said = state.get("said", False)
