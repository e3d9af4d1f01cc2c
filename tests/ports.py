import socket


def free_port():
    """A port of this machine that no one listens on."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])
