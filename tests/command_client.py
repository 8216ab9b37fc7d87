"""Have ``tests/command_server.py`` run a program on this process's own streams.

For programs that a shell starts: ``python -IS command_client.py SOCKET PROGRAM ARGUMENTS``.
"""

import json
import os
import socket
import sys

channel = socket.socket(fileno=os.dup(int(sys.argv[1])))
code, told = os.pipe()
request = {
    "program": sys.argv[2],
    "arguments": sys.argv[3:],
    "directory": os.getcwd(),  # noqa: PTH109  (pathlib takes long to import)
    "environ": dict(os.environ),
    "terminal": False,
}
socket.send_fds(channel, [json.dumps(request).encode()], [0, 1, 2, told])
os.close(told)
with os.fdopen(code) as answer:
    sys.exit(int(answer.read().split()[1]))
