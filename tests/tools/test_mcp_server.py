"""Tools of MCP servers, with servers of the real package: over pipes and HTTP, dying, hanging, not starting, ending with their users."""

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from lmrl.errors import PluginError
from lmrl.recipe.paths import resolve_files
from lmrl.tools import mcp_server
from lmrl.tools.functions import ToolBox, ToolLost, load_tools

SERVER = Path(__file__).with_name("arithmetic_server.py")
needs_mcp = pytest.mark.skipif(find_spec("mcp") is None, reason="mcp is not installed")


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """The file of the servers' starts, whose processes must all be gone after the test."""
    path = tmp_path / "starts"
    monkeypatch.setenv("MCP_TEST_NOTES", str(path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH") or os.getcwd())
    yield path
    gc.collect()
    for process in started(path):
        assert gone(process)


def started(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def gone(process, seconds=10):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    return False


def stdio(**more):
    return [{"mcp": {"command": [sys.executable, str(SERVER)], "env": ["MCP_TEST_NOTES", "PYTHONPATH"]} | more}]


def run(tools, *calls, **limits):
    box = ToolBox(tools, **limits)

    async def all_calls():
        return [await box.run(name, arguments) for name, arguments in calls]

    return asyncio.run(all_calls())


@needs_mcp
def test_tools_are_described_and_called(notes):
    tools = load_tools(stdio())
    assert [tool.name for tool in tools] == ["add", "process_id", "die", "hang", "shout", "environment"]
    assert tools[0].described["function"]["description"] == "Add two numbers. Both are whole."
    parameters = tools[0].described["function"]["parameters"]
    assert parameters["required"] == ["a", "b"] and parameters["properties"]["b"]["type"] == "integer"
    results = run(
        tools,
        ("add", {"a": 2, "b": 3}),
        ("add", {"a": 2, "b": "x"}),
        ("process_id", {}),
        ("shout", {}),
        ("environment", {"name": "MCP_TEST_NOTES"}),
        ("environment", {"name": "LMRL_TEST_MODEL"}),
        characters=200,
    )
    assert results[0] == "5" and results[2] == str(started(notes)[0]) and results[3] == "a" * 60 + "b" * 60
    assert results[1].startswith("error: Error executing tool add") and "should be a valid int" in results[1]
    assert results[4:] == [str(notes), "unset"]
    shortened = run(tools, ("shout", {}), characters=40)  # another event loop, the same server
    assert shortened == ["a" * 20 + "\n[... 80 characters ...]\n" + "b" * 20] and len(started(notes)) == 1


@needs_mcp
def test_calls_run_side_by_side(notes):
    (add,) = load_tools(stdio(only=["add"]))
    box = ToolBox([add])

    async def many():
        return await asyncio.gather(*[box.run("add", {"a": n, "b": 1}) for n in range(40)])

    assert asyncio.run(many()) == [str(n + 1) for n in range(40)]


@needs_mcp
def test_a_dead_server_is_started_again(notes):
    tools = load_tools(stdio())
    results = run(tools, ("die", {}), ("add", {"a": 2, "b": 3}), ("add", {"a": 3, "b": 3}))
    assert results == ["error: the tool's server ended during the call", "5", "6"] and len(started(notes)) == 2


@needs_mcp
def test_a_hanging_server_is_replaced(notes, monkeypatch):
    monkeypatch.setattr(mcp_server, "ALIVE_SECONDS", 0.3)
    tools = load_tools(stdio())
    assert run(tools, ("hang", {}), seconds=0.5) == ["error: timed out after 0.5 s"]
    assert run(tools, ("add", {"a": 2, "b": 3}), seconds=30) == ["5"] and len(started(notes)) == 2


@needs_mcp
def test_a_server_that_stays_dead_fails_episodes(notes, tmp_path):
    tools = load_tools(stdio())
    notes.with_name("starts.broken").touch()
    assert run(tools, ("die", {})) == ["error: the tool's server ended during the call"]
    for _ in range(2):  # the second time without another try
        with pytest.raises(ToolLost, match="cannot be started or reached: .*its last output: the disk is gone"):
            run(tools, ("add", {"a": 2, "b": 3}))
    assert len(started(notes)) == 2


@needs_mcp
def test_a_server_ends_with_the_process(notes):
    code = f"from lmrl.tools.functions import load_tools\ntools = load_tools({stdio()!r})\nprint(tools[0].name)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "add\n"
    assert len(started(notes)) == 1 and gone(started(notes)[0], 5)


@needs_mcp
def test_a_server_ends_with_a_killed_process(notes):
    code = f"from lmrl.tools.functions import load_tools\ntools = load_tools({stdio()!r})\nimport os; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == -signal.SIGKILL
    assert len(started(notes)) == 1 and gone(started(notes)[0], 5)


@pytest.fixture
def port(notes):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        free = one.getsockname()[1]
    processes = []

    def start():
        processes.append(subprocess.Popen([sys.executable, str(SERVER), str(free)], stderr=subprocess.DEVNULL))
        ends = time.monotonic() + 30
        while time.monotonic() < ends:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", free)) == 0:
                    return free
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    yield start
    for process in processes:
        process.kill()
        process.wait()


@needs_mcp
def test_an_address_that_comes_back_is_used_again(port):
    free = port()
    tools = load_tools([{"mcp": {"url": f"http://127.0.0.1:{free}/mcp", "start_seconds": 5}}])
    results = run(tools, ("add", {"a": 2, "b": 3}), ("die", {}))
    assert results == ["5", "error: the tool's server ended during the call"]
    with pytest.raises(ToolLost, match="cannot be started or reached: All connection attempts failed"):
        run(tools, ("add", {"a": 2, "b": 3}))
    port()
    time.sleep(max(0.0, tools[0].connection._link._lost[0] - time.monotonic()))
    assert run(tools, ("add", {"a": 4, "b": 3})) == ["7"]


@needs_mcp
def test_token_is_sent(monkeypatch):
    monkeypatch.setenv("MCP_TEST_TOKEN", "a-long-secret-of-mine")
    heard = b""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        settings = {
            "url": f"http://127.0.0.1:{one.getsockname()[1]}/mcp",
            "token_env": "MCP_TEST_TOKEN",
            "start_seconds": 2,
        }

        async def listen():
            nonlocal heard
            work = asyncio.to_thread(lambda: pytest.raises(PluginError, load_tools, [{"mcp": settings}]))
            task = asyncio.ensure_future(work)
            connection, _ = await asyncio.to_thread(one.accept)
            heard = await asyncio.to_thread(connection.recv, 65536)
            connection.close()
            return str((await task).value)

        said = asyncio.run(listen())
    assert b"authorization: bearer a-long-secret-of-mine" in heard.lower() and "a-long-secret" not in said


@needs_mcp
def test_what_cannot_serve_is_refused(notes, monkeypatch):
    for tools, said in (
        (
            [{"mcp": {"command": ["no-such-program"]}}],
            "mcp.command: 'no-such-program' is not a program on this machine",
        ),
        (stdio(only=["sub"]), "has no tool 'sub'; it has add, process.id"),
        (stdio(env=["MCP_UNSET"]), "environment variable MCP_UNSET is not set"),
        ([{"mcp": {"command": [sys.executable, "-c", "import sys; sys.exit('no key')"]}}], "its last output: no key"),
        ([{"mcp": {"command": ["sleep", "60"], "start_seconds": 0.5}}], "not ready after 0.5 s"),
    ):
        with pytest.raises(PluginError, match=f"task.tools.0: .*{said}"):
            load_tools(tools)
    with pytest.raises(PluginError, match="two tools are called 'add'"):
        load_tools(stdio(only=["add"]) * 2)


@pytest.mark.parametrize(
    "tool, said",
    [
        ({"mcp": {}}, "mcp: set either `command`"),
        ({"mcp": {"command": ["a"], "url": "http://b"}}, "mcp: set either `command`"),
        ({"mcp": {"url": "ftp://b"}}, "does not begin with http"),
        ({"mcp": {"url": "http://b", "env": ["A"]}}, "`env` goes with `command`"),
        ({"mcp": {"command": ["a"], "shell": True}}, "mcp.shell: Extra inputs"),
        ({"mcp": {"command": "a b"}}, "mcp.command: Input should be a valid list"),
        ({"pyton": {}}, "'pyton' is not a kind of tool"),
        ({}, "nothing is not a kind of tool"),
    ],
)
def test_mistakes_in_settings(tool, said):
    with pytest.raises(PluginError, match=f"task.tools.0: .*{said}"):
        load_tools([tool])


def test_files_of_a_command_lie_beside_the_recipe(tmp_path):
    (tmp_path / "server.py").touch()
    given = {"task": {"tools": [{"mcp": {"command": ["python", "server.py", "-q"], "env": ["A"]}}, {"python": {}}]}}
    resolve_files(given, tmp_path)
    command = ["python", str(tmp_path / "server.py"), "-q"]
    assert given["task"]["tools"] == [{"mcp": {"command": command, "env": ["A"]}}, {"python": {}}]


def test_needs_the_package(monkeypatch):
    monkeypatch.setattr("lmrl.extras.find_spec", lambda name: None)
    with pytest.raises(PluginError, match="install the extra 'mcp'"):
        load_tools([{"mcp": {"command": ["python"]}}])


def test_results_of_all_kinds_are_text():
    from types import SimpleNamespace as Block

    content = [Block(type="text", text="a"), Block(type="image"), Block(type="resource", resource=Block(text="b"))]
    assert mcp_server._text(Block(content=content, structured_content=None)) == "a\n[image]\nb"
    assert mcp_server._text(Block(content=[], structured_content={"a": 1})) == json.dumps({"a": 1})
