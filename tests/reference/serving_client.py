"""A client that costs next to nothing, for measuring servers: HTTP 1.0, so that a stream is lines until the end."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any


async def stream(port: int, body: dict[str, Any], path: str = "/v1/chat/completions") -> AsyncIterator[dict[str, Any]]:
    """The objects of a streamed answer. Leaving the iteration closes the connection.

    Raises:
        RuntimeError: the server refuses.
    """
    data = json.dumps(body | {"stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        headers = "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(data)}"
        writer.write("\r\n".join((f"POST {path} HTTP/1.0", *headers, "", "")).encode() + data)
        status = (await reader.readline()).decode().strip()
        if " 200" not in status:
            raise RuntimeError(f"{status}: {(await reader.read()).decode()[-300:]}")
        async for line in reader:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    finally:
        writer.close()


async def read(port: int, path: str) -> str:
    """The body of a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer.partition("\r\n\r\n")[2]
