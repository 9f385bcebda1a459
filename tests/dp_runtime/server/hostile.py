"""Requests that nobody should send, byte by byte."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

WAIT_S = 60.0
KEEP_OPEN = b"Connection: keep-alive"  # a server that hangs up amidst a body loses its answer


@dataclass(frozen=True)
class Reply:
    status: int
    head: bytes
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's format; every one has these four entries."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}, error
        assert 0 < len(error["message"]) <= 2000
        assert error["message"].isprintable()
        return error


def connected(url: str, receive_buffer: int | None = None) -> socket.socket:
    place = urlparse(url)
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(WAIT_S)
    client.connect((place.hostname, place.port))
    return client


def read_all(client: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    received = b""
    while more := client.recv(1 << 16):
        received += more
    return received


def read_reply(client: socket.socket) -> Reply:
    """Read one answer, without its interim ones; the connection may stay open."""
    with client.makefile("rb") as file:
        while True:
            head = b"".join(iter(file.readline, b"\r\n"))
            status = int(head.split(b" ")[1])
            if status >= 200:
                break
        length = re.search(rb"(?i)content-length: (\d+)", head)
        return Reply(status, head, file.read(int(length[1])) if length else file.read())


def ask(url: str, request: bytes) -> Reply:
    with connected(url) as client:
        client.sendall(request)
        return read_reply(client)


def post(
    body: bytes,
    path: bytes = b"/v1/completions",
    *fields: bytes,
    method: bytes = b"POST",
    version: bytes = b"HTTP/1.1",
    content_type: bytes = b"application/json",
    length: bool = True,
) -> bytes:
    head = [b"%b %b %b" % (method, path, version), b"Host: x", *fields]
    head += [] if KEEP_OPEN in fields else [b"Connection: close"]
    head += [b"Content-Type: " + content_type] if content_type else []
    head += [b"Content-Length: %d" % len(body)] if length else []
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunked(body: bytes, *fields: bytes) -> bytes:
    fields = fields or (b"Transfer-Encoding: chunked", KEEP_OPEN)
    return post(body, b"/v1/completions", *fields, length=False)


def get(path: bytes, *fields: bytes) -> bytes:
    return post(b"", path, *fields, method=b"GET", length=False)


def prompt(*fields: str) -> bytes:
    return ("{" + ",".join(('"prompt":"a","max_tokens":1', *fields)) + "}").encode()


GOOD = prompt()

# Bodies that are refused: by what they are, not by a field.
NO_BODIES: dict[str, bytes] = {
    "none": b"",
    "cut off": b"{",
    "not UTF-8": b'{"prompt":"\xff\xfe"}',
    "NUL": b'{"prompt":"\x00"}',
    "more behind": GOOD + b"x",
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"prompt":' * 100_000,
    "deep prompt": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"prompt":"a","seed":' + b"9" * 5000 + b"}",
    "null": b"null",
    "list": b"[]",
    "text": b'"prompt"',
    "number": b"1",
    "surrogate in a name": prompt(r'"\ud800":1'),
    "names": b"{" + b",".join(b'"%x":1' % n for n in range(2000)) + b"}",
    "form": b"prompt=a",
}

# What a field must not be, and the field that the error names.
FIELDS: dict[str, tuple[str, str]] = {
    "surrogate": (r'"prompt":"\ud800"', "prompt"),
    "surrogate to stop at": (r'"stop":"\ud800"', "stop"),
    "surrogate as a model": (r'"model":"\ud800"', "model"),
    "surrogate as an id": (r'"request_id":"\ud800"', "request_id"),
    "surrogate as a token": (r'"logit_bias":{"\ud800":1}', "logit_bias"),
    "surrogate as a word": (r'"bad_words":["\ud800"]', "bad_words[0]"),
    "infinite": ('"temperature":1e999', "temperature"),
    "minus infinite": ('"top_p":-1e999', "top_p"),
    "NaN": ('"temperature":NaN', "temperature"),
    "Infinity": ('"min_p":Infinity', "min_p"),
    "NaN in an object": ('"logit_bias":{"1":NaN}', "logit_bias"),
    "4000 digits": (f'"seed":{"9" * 4000}', "seed"),
    "4000 digits of n": (f'"n":{"9" * 4000}', "n"),
    "4000 digits of a token": (f'"prompt":[{"9" * 4000}]', "prompt"),
    "huge n": ('"n":1000000000', "n"),
    "negative n": ('"n":-1', "n"),
    "huge max_tokens": ('"max_tokens":99999999999999999999', "max_tokens"),
    "huge logprobs": ('"logprobs":99999999999999999999', "logprobs"),
    "huge rank": ('"dp_rank":99999999999999999999', "dp_rank"),
    "huge token": ('"stop_token_ids":[99999999999999999999]', "stop_token_ids"),
    "huge biased token": ('"logit_bias":{"99999999999999999999":1}', "logit_bias"),
    "negative token": ('"prompt":[-1]', "prompt"),
    "bool as a token": ('"prompt":[true]', "prompt"),
    "lists in lists": ('"prompt":[[[1]]]', "prompt"),
    "texts and tokens": ('"prompt":["a",1]', "prompt"),
    "empty lists": ('"prompt":[[],[]]', "prompt"),
    "floats": ('"prompt":[1.5' + ",1.5" * 1000 + "]", "prompt"),
    "many lists": ('"prompt":[[]' + ",[]" * 70_000 + "]", "prompt"),
    "many biases": (f'"logit_bias":{json.dumps(dict.fromkeys(range(5000), 1))}', "logit_bias"),
    "many bad biases": (
        f'"logit_bias":{json.dumps(dict.fromkeys(range(5000), "x"))}',
        "logit_bias",
    ),
    "many stops": (f'"stop":{json.dumps(["a"] * 100_000)}', "stop"),
    "a long stop": (f'"stop":"{"a" * 5000}"', "stop"),
    "many tokens to stop at": (f'"stop_token_ids":{[1] * 5000}', "stop_token_ids"),
    "many words": (f'"bad_words":{json.dumps(["a"] * 1000)}', "bad_words"),
    "line break in an id": (r'"request_id":"a\nb"', "request_id"),
    "a long id": (f'"request_id":"{"a" * 100_000}"', "request_id"),
    "a long name": (f'"{"a" * 100_000}":1', "a" * 197 + "..."),
    "a text as a flag": ('"stream":"yes"', "stream"),
    "a number as a flag": ('"echo":1', "echo"),
    "a list of options": ('"stream":true,"stream_options":[]', "stream_options"),
    "biases as a list": ('"logit_bias":[1]', "logit_bias"),
}

# Odd, and served.
SERVED: dict[str, bytes] = {
    "escaped NUL": post(rb'{"prompt":"a\u0000b","max_tokens":1}'),
    "byte order mark": post(b"\xef\xbb\xbf" + GOOD),
    "UTF-16": post(GOOD.decode().encode("utf-16")),
    "spaces": post(b" " * 1_000_000 + GOOD),
    "names twice": post(prompt('"prompt":"b"', '"max_tokens":2')),
    "unused surrogate": post(prompt(r'"user":"\ud800"')),
    "unused depth": post(prompt('"metadata":{"a":' + "[" * 900 + "]" * 900 + "}")),
    "odd id": post(prompt('"request_id":"Ω☃ \\"\'<>%00"')),
    "HTTP/1.0": post(GOOD, version=b"HTTP/1.0"),
    "HTTP/1.0 stream": post(prompt('"stream":true'), version=b"HTTP/1.0"),
    "header in UTF-8": post(GOOD, b"/v1/completions", "X: Ω☃".encode()),
    "key in no encoding": post(GOOD, b"/v1/completions", b"Authorization: \xff\xfe"),
    "100-continue": post(GOOD, b"/v1/completions", b"Expect: 100-continue"),
    "odd charset": post(GOOD, content_type='application/json; charset="Ω'.encode()),
    "a body to GET": post(b"x" * 100_000, b"/health", method=b"GET"),
    "long query": get(b"/health?" + b"a" * 60_000),
    "other host": get(b"/v1/models", b"Host: \xff<script>").replace(b"Host: x\r\n", b""),
    "upgrade": get(b"/v1/models", b"Connection: Upgrade", b"Upgrade: websocket"),
    "HTTP/2 upgrade": get(b"/v1/models", b"Connection: Upgrade", b"Upgrade: h2c"),
    "pipelined": get(b"/health", KEEP_OPEN) * 5 + get(b"/health"),
    "garbage behind": post(prompt('"stream":true'), b"/v1/completions", KEEP_OPEN)
    + b"\0garbage\r\n\r\n",
}

# No HTTP, or none of ours: the status.
HEADS: dict[str, tuple[bytes, int]] = {
    "method": (post(GOOD, method=b"PUT"), 405),
    "no method": (post(GOOD, method=b"F OO"), 400),
    "OPTIONS of a browser": (post(GOOD, b"/v1/completions", b"Origin: x", method=b"OPTIONS"), 405),
    "TRACE": (post(GOOD, method=b"TRACE"), 405),
    "CONNECT": (post(GOOD, b"a:1", method=b"CONNECT"), 404),
    "path": (get(b"/nothing"), 404),
    "no path": (get(b"/%ff%00%zz"), 404),
    "dots": (get(b"/../../etc/passwd"), 404),
    "another's path": (get(b"http://other/health"), 404),
    "slash": (get(b"/health/"), 404),
    "a page of documents": (get(b"/docs"), 404),
    "long path": (get(b"/" + b"a" * 60_000), 404),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "TLS": (bytes.fromhex("16030100c2010000be0303") + b"\0" * 200, 400),
    "bytes": (bytes(range(256)) * 4, 400),
    "no host": (get(b"/health").replace(b"Host: x\r\n", b""), 400),
    "two hosts": (get(b"/health", b"Host: y"), 400),
    "no colon": (get(b"/health", b"abc"), 400),
    "NUL in a header": (get(b"/health", b"X: a\0b"), 400),
    "header's name": (get(b"/health", "Ω: 1".encode()), 400),
    "space in front": (get(b"/health").replace(b"Host", b" Host"), 400),
    "long header": (b"GET /health HTTP/1.1\r\nX: " + b"a" * 80_000, 400),
    "text": (post(GOOD, content_type=b"text/plain"), 400),
    "no type": (post(GOOD, content_type=b""), 400),
    "multipart": (post(b"--x\r\n", content_type=b"multipart/form-data; boundary=x"), 400),
    "two lengths": (post(GOOD, b"/v1/completions", b"Content-Length: 5"), 400),
    "length and chunks": (post(b"0\r\n\r\nGET", b"/tokenize", b"Transfer-Encoding: chunked"), 400),
    "length below 0": (chunked(b"", b"Content-Length: -1"), 400),
    "length with a sign": (chunked(b"ab", b"Content-Length: +2"), 400),
    "length of 30 digits": (chunked(b"", b"Content-Length: " + b"9" * 30), 400),
    "length of 5000 digits": (chunked(b"", b"Content-Length: " + b"9" * 5000), 400),
    "length of 100 GB": (chunked(b"", b"Content-Length: 99999999999"), 413),
    "20 MB": (post(b" " * 20_000_000, b"/tokenize", KEEP_OPEN), 413),
    "values": (post(b"[" + b"1," * 400_000 + b"1]"), 413),
    "gzip": (chunked(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked"), 400),
    "two encodings": (chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x"),
                      400),
    "space before the colon": (chunked(b"0\r\n\r\n", b"Transfer-Encoding : chunked"), 400),
    "size of a chunk": (chunked(b"zz\r\n"), 400),
    "size below 0": (chunked(b"-1\r\n"), 400),
    "size of 30 digits": (chunked(b"F" * 30 + b"\r\n"), 400),
    "20 MB in chunks": (chunked((b"100000\r\n" + b" " * 0x100000 + b"\r\n") * 20), 413),
}  # fmt: skip
