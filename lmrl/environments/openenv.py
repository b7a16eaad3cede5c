"""Environments on an OpenEnv server (https://github.com/meta-pytorch/OpenEnv): `environment:
openenv:http://HOST:8000`."""

from __future__ import annotations

import json
import urllib.request
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from lmrl.environments.base import TextEnvironment
from lmrl.errors import PluginError

OWN = ("done", "reward", "metadata")
"""Fields of observations and actions that are not the environment's own."""


class OpenEnvText(TextEnvironment):
    """An environment that runs on another machine; each running episode has its own session and connection.

    id: the server's address. action_field, observation_field: the fields that hold the action's and the observation's
    text (None: the only text field in the server's schema; an observation with several becomes JSON as a whole).
    action: further fields of each action. reset: further arguments of each reset, besides the seed. timeout: seconds
    that the server has to answer.
    """

    def __init__(
        self,
        id: str,
        action_field: str | None = None,
        observation_field: str | None = None,
        action: dict[str, Any] | None = None,
        reset: dict[str, Any] | None = None,
        timeout: float = 60.0,
    ):
        try:
            import_module("openenv.core")
        except ImportError as error:
            raise PluginError(
                f"task.environment: openenv cannot be imported ({error}): pip install -e '.[openenv]'"
            ) from error
        address = urlsplit(id)
        if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc:
            raise PluginError(
                "task.environment: expected openenv:http://HOST:PORT, an address without user and password"
            )
        self.url, self.timeout = id.rstrip("/"), timeout
        schema = self._get("schema")
        self.action_field = action_field or only_text(schema.get("action", {}))
        if self.action_field is None:
            fields = ", ".join(fields_of(schema.get("action", {}))) or "none"
            raise PluginError(
                f"task.action_field: which field of {self.url}'s actions is the policy's text? It has {fields}"
            )
        self.observation_field = observation_field or only_text(schema.get("observation", {}))
        self.more, self.options = action or {}, reset or {}
        about = self._get("metadata")
        self.version = f"{about.get('name', 'unnamed')} {about.get('version') or ''}".strip()
        self.client = self._new_client()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return self._text(self.client.reset(seed=seed, **self.options).observation), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        result = self.client.step(self.more | {self.action_field: action})
        reward = 0.0 if result.reward is None else float(result.reward)
        return self._text(result.observation), reward, bool(result.done), False, {}

    def close(self) -> None:
        self.client.close()

    def _new_client(self) -> Any:
        return import_module("openenv.core").GenericEnvClient(base_url=self.url, message_timeout_s=self.timeout).sync()

    def _text(self, observation: Any) -> str:
        own = {name: value for name, value in dict(observation or {}).items() if name not in OWN}
        if self.observation_field is None:
            return json.dumps(own, ensure_ascii=False, sort_keys=True)
        if self.observation_field not in own:
            raise KeyError(
                f"the observation has no field '{self.observation_field}' (task.observation_field), but {', '.join(own)}"
            )
        return str(own[self.observation_field])

    def _get(self, route: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self.url}/{route}", timeout=self.timeout) as answer:
                found = json.loads(answer.read())
        except (OSError, ValueError) as error:
            raise PluginError(
                f"task.environment: {self.url}/{route}: no OpenEnv server answers there: {error}"
            ) from error
        return found if isinstance(found, dict) else {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"client": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.client = self._new_client()


def fields_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The fields of a JSON schema that are the environment's own."""
    return {name: field for name, field in schema.get("properties", {}).items() if name not in OWN}


def only_text(schema: dict[str, Any]) -> str | None:
    """The field that is text; None if there is none, or several. Required fields take precedence."""
    texts = [name for name, field in fields_of(schema).items() if "string" in types_of(field)]
    required = [name for name in texts if name in schema.get("required", ())]
    chosen = required or texts
    return chosen[0] if len(chosen) == 1 else None


def types_of(field: dict[str, Any]) -> set[str]:
    arms = [field, *field.get("anyOf", ())]
    return {kind for arm in arms if isinstance(kind := arm.get("type"), str)}
