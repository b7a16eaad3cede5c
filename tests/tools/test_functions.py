"""Tools in Python: how they are described, checked, run and limited."""

import asyncio
import functools
import itertools
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Literal

import pytest
from pydantic import Field

from lmrl.errors import PluginError
from lmrl.tools.functions import PythonTool, ToolBox, load_tools


def divide(a: float, b: float, rounding: Literal["up", "down"] | None = None) -> float:
    """Divide a by b.

    More for people.
    """
    return a / b


async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "waited"


def block(seconds: float) -> str:
    time.sleep(seconds)
    return "blocked"


def table(rows: list[int]) -> dict:
    return {"rows": rows, "text": "é"}


def long() -> str:
    return "a" * 60 + "b" * 60


class Counter:
    """Count calls of this episode."""

    def __init__(self):
        self.count = 0

    def __call__(self, step: int = 1) -> int:
        self.count += step
        return self.count


def run(tools, *calls, **limits):
    box = ToolBox([PythonTool(tool) for tool in tools], **limits)

    async def all_calls():
        return [await box.run(name, arguments) for name, arguments in calls]

    return asyncio.run(all_calls())


def test_failed_calls_are_counted():
    """A result that begins like an error is none; code that exits with 3 after printing has failed."""

    def read_log() -> str:
        return "error: disk full"

    tools = [PythonTool(read_log), *load_tools([{"python": {"isolation": "limits"}}])]
    box = ToolBox(tools)
    calls = [
        ("read_log", {}, "error: disk full", 0),
        ("read_log", {"x": 1}, "error: x: Extra inputs are not permitted", 1),
        ("python", {"code": "print('a'); 1 / 0"}, "a\nZeroDivisionError: division by zero (line 1)", 1),
        ("python", {"code": "print('a'); import sys; sys.exit(3)"}, "a\nerror: exit code 3", 2),
        ("write_log", {}, "error: there is no tool 'write_log'; the tools are read_log, python", 3),
    ]
    for name, arguments, text, failed in calls:
        assert (asyncio.run(box.run(name, arguments)), box.failed) == (text, failed)


def test_a_description_comes_from_type_hints():
    assert PythonTool(divide).described == {
        "type": "function",
        "function": {
            "name": "divide",
            "description": "Divide a by b.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "number"},
                    "b": {"type": "number"},
                    "rounding": {
                        "anyOf": [{"enum": ["up", "down"], "type": "string"}, {"type": "null"}],
                        "default": None,
                    },
                },
                "required": ["a", "b"],
            },
        },
    }


def test_results_and_errors_are_text():
    results = run(
        [divide, table],
        ("divide", {"a": 3, "b": "1.5"}),
        ("divide", {"a": 1, "b": 0}),
        ("divide", {"a": "one", "b": 1}),
        ("divide", {"a": 1, "b": 1, "c": 1}),
        ("divide", {"a": 1}),
        ("multiply", {}),
        ("table", {"rows": [1, 2]}),
    )
    assert results[0] == "2.0" and results[6] == '{"rows": [1, 2], "text": "é"}'
    assert results[1] == "error: ZeroDivisionError: float division by zero"
    assert results[2].startswith("error: a: Input should be a valid number")
    assert results[3] == "error: c: Extra inputs are not permitted"
    assert results[4] == "error: b: Field required"
    assert results[5] == "error: there is no tool 'multiply'; the tools are divide, table"


def test_time_and_output_are_limited():
    began = time.monotonic()
    results = run(
        [wait, block, long],
        ("wait", {"seconds": 9}),
        ("block", {"seconds": 3}),
        ("long", {}),
        seconds=0.2,
        characters=40,
    )
    assert results[:2] == ["error: timed out after 0.2 s"] * 2 and time.monotonic() - began < 2
    assert results[2] == "a" * 20 + "\n[... 80 characters ...]\n" + "b" * 20


def test_yielded_items_are_a_list():
    def count(to: int):
        for number in range(to):
            time.sleep(0.3 * (to > 2))
            yield number

    async def slowly(to: int):
        yield "a"
        await asyncio.sleep(to)

    def broken():
        yield 1
        raise KeyError("b")

    calls = ("count", {"to": 2}), ("slowly", {"to": 0}), ("broken", {}), ("count", {"to": 9}), ("slowly", {"to": 9})
    late = "error: timed out after 0.5 s"
    assert run([count, slowly, broken], *calls, seconds=0.5) == ["[0, 1]", '["a"]', "error: KeyError: 'b'", late, late]


def test_bounds_of_a_hint_are_described_and_checked():
    def pick(number: Annotated[int, Field(ge=1, le=3, description="Which.")]) -> int:
        return number

    described = PythonTool(pick).described["function"]["parameters"]["properties"]["number"]
    assert described == {"type": "integer", "minimum": 1, "maximum": 3, "description": "Which."}
    assert run([pick], ("pick", {"number": 7})) == ["error: number: Input should be less than or equal to 3"]


def test_a_generator_is_stopped_at_its_limit():
    yielded = itertools.count()

    def endless():
        while True:
            yield next(yielded)
            time.sleep(0.01)

    assert run([endless], ("endless", {}), seconds=0.1) == ["error: timed out after 0.1 s"]
    time.sleep(0.1)
    so_far = next(yielded)
    time.sleep(0.1)
    assert next(yielded) == so_far + 1


def test_the_cause_in_a_task_group_is_named():
    async def fetch() -> str:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait("soon"))

    assert run([fetch], ("fetch", {}))[0].startswith("error: TypeError: ")


def test_a_class_is_made_anew_for_each_episode():
    assert run([Counter], ("Counter", {}), ("Counter", {"step": 4})) == ["1", "5"]
    assert run([Counter], ("Counter", {})) == ["1"]


def test_a_decorated_async_function_is_awaited():
    @functools.wraps(wait)
    def logged(**arguments):
        return wait(**arguments)

    assert run([logged], ("wait", {"seconds": 0}), ("wait", {"seconds": 9}), seconds=0.2) == [
        "waited",
        "error: timed out after 0.2 s",
    ]


def test_errors_of_control_flow_are_errors_to_read():
    def first() -> str:
        return next(iter([]))

    def cancelled() -> str:
        raise asyncio.CancelledError

    async def lost() -> str:
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    calls = [("first", {}), ("cancelled", {}), ("lost", {})]
    stop, *cancel = run([first, cancelled, lost], *calls, seconds=5)
    assert stop == "error: RuntimeError: raised StopIteration"
    assert cancel == ["error: RuntimeError: raised CancelledError"] * 2


def test_a_result_is_text_that_can_be_encoded():
    def names() -> str:
        return "a\udcff"

    assert run([names], ("names", {})) == ["a?"]


def test_parameters_may_have_any_name():
    def odd(json: int, copy: int, _a: int, model_fields: list[int], model_config: int = 5) -> list:
        return [json, copy, _a, model_fields, model_config]

    with warnings.catch_warnings(action="error"):
        tool = PythonTool(odd)
    assert list(tool.described["function"]["parameters"]["properties"]) == [
        "json",
        "copy",
        "_a",
        "model_fields",
        "model_config",
    ]
    calls = [("odd", {"json": 1, "copy": 2, "_a": 3, "model_fields": [4]}), ("odd", {"json": "x"})]
    assert run([odd], *calls) == [
        "[1, 2, 3, [4], 5]",
        "error: json: Input should be a valid integer, unable to parse string as an integer",
    ]


def test_the_model_reads_the_alias_and_the_function_its_own_name():
    def half(number: Annotated[int, Field(alias="n")]) -> float:
        return number / 2

    assert list(PythonTool(half).described["function"]["parameters"]["properties"]) == ["n"]
    assert run([half], ("half", {"n": 4})) == ["2.0"]


def test_what_cannot_be_described_is_refused():
    def bare(a): ...
    def many(*a: int): ...
    def odd(a: object()): ...  # noqa: F821
    def called(a: Callable[[], int]): ...

    class Needs:
        def __init__(self, key): ...
        def __call__(self, a: int): ...

    for tool, said in (
        (bare, "has no type hint"),
        (many, "takes \\*a"),
        (odd, "cannot be (read|described)"),
        (called, "'called' cannot be described: Cannot generate a JsonSchema"),
        (Needs, "class 'Needs' is made without arguments, but missing a required argument: 'key'"),
    ):
        with pytest.raises(PluginError, match=said):
            PythonTool(tool)
    with pytest.raises(PluginError, match="two tools are called 'divide'"):
        load_tools([f"{__file__}:divide"] * 2)
    with pytest.raises(PluginError, match="memory_mb"):
        load_tools([{"python": {"memory_mb": 1}}])
