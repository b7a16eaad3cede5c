"""An MCP server for tests; with a port as argument over HTTP. MCP_TEST_NOTES: a file that its starts are written to."""

import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("arithmetic", log_level="ERROR")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers.

    Both are whole."""
    return a + b


@server.tool(name="process.id")
def process_id() -> int:
    return os.getpid()


@server.tool()
def die() -> str:
    os._exit(3)


@server.tool()
async def hang() -> str:
    time.sleep(60)  # the whole server


@server.tool()
def shout() -> str:
    return "a" * 60 + "b" * 60


@server.tool()
def environment(name: str) -> str:
    return os.environ.get(name, "unset")


if os.environ.get("MCP_TEST_NOTES"):
    with open(os.environ["MCP_TEST_NOTES"], "a") as file:
        file.write(f"{os.getpid()}\n")
    if os.path.exists(os.environ["MCP_TEST_NOTES"] + ".broken"):
        sys.exit("the disk is gone")
if len(sys.argv) > 1:
    server.run("streamable-http", port=int(sys.argv[1]))
else:
    server.run()
