"""Python runs this as it starts in the processes of `pauses.start`: it lets them stop at the points that the
variable PAUSES names, below the path of a socket."""

import functools
import importlib
import os
import socket

SOCKET, *POINTS = os.environ["PAUSES"].split("\n")


def stopping(function, name):
    @functools.wraps(function)
    def stops(*arguments, **options):
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(SOCKET)
                connection.sendall(f"{name} {os.getpid()}\n".encode())
                connection.recv(1)
            except OSError:  # the test waits no longer
                pass
        return function(*arguments, **options)

    return stops


for point in POINTS:
    module, name = point.split(":")
    owner = importlib.import_module(module)
    *within, last = name.split(".")
    for part in within:
        owner = getattr(owner, part)
    setattr(owner, last, stopping(getattr(owner, last), name))
