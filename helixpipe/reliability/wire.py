"""Messages between a rank, its sentinel and the hub: one JSON object per line."""

from __future__ import annotations

import json
import socket
from typing import Any

Message = dict[str, Any]

# A longer line is no message of ours.
_MAX_LINE = 1 << 20
_TIMEOUT_S = 2.0


class Connection:
    """One end of a stream socket, never blocking for long.

    Args:
        stream: connected.
    """

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.is_open = True
        stream.settimeout(_TIMEOUT_S)
        self._buffer = b""

    def fileno(self) -> int:
        """For selectors."""
        return self.stream.fileno()

    def send(self, message: Message) -> None:
        """Send; a connection that has broken is marked as closed."""
        try:
            self.stream.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_open = False

    def receive(self) -> list[Message]:
        """What has arrived, once the socket is readable; marks the connection as closed at its end."""
        try:
            found = self.stream.recv(1 << 16)
        except OSError:
            found = b""
        if not found or len(self._buffer) > _MAX_LINE:
            self.is_open = False
            return []
        *lines, self._buffer = (self._buffer + found).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.is_open = False
            return []
        return messages

    def close(self) -> None:
        """Close the socket."""
        self.is_open = False
        self.stream.close()
