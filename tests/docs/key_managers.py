"""Key managers on this machine, which the real client libraries take for the real ones.

Each context manager starts one and gives the environment that leads its client there. The pages'
code is then what a reader runs: it names no endpoint, and is given no stand-in for a client.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer, StreamRequestHandler, ThreadingTCPServer
from typing import Any, Final

import boto3
import grpc
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID
from google.cloud.kms_v1.types import service as kms_types
from moto import mock_aws

from sqlalchemy_lucent import generate_master_key

_GOOGLE_HOST: Final = "cloudkms.googleapis.com"
_VAULT_TOKEN: Final = "hvs.of-the-tests"


class _Wrapping:
    """What a key manager does: it wraps and unwraps under a key that does not leave it."""

    def __init__(self) -> None:
        self._key = AESGCM(AESGCM.generate_key(256))

    def wrap(self, plaintext: bytes, associated_data: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._key.encrypt(nonce, plaintext, associated_data)

    def unwrap(self, wrapped: bytes, associated_data: bytes) -> bytes:
        return self._key.decrypt(wrapped[:12], wrapped[12:], associated_data)


@contextmanager
def _serving(server: BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# -- AWS -------------------------------------------------------------------------------------------


@contextmanager
def aws() -> Iterator[dict[str, str]]:
    """AWS KMS by moto, with a key ``alias/lucent``."""
    with mock_aws():
        region = "eu-central-1"
        kms = boto3.client("kms", region_name=region)
        key = kms.create_key()["KeyMetadata"]["KeyId"]
        kms.create_alias(AliasName="alias/lucent", TargetKeyId=key)
        yield {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": region,
        }


# -- HashiCorp Vault -------------------------------------------------------------------------------


@contextmanager
def vault() -> Iterator[dict[str, str]]:
    """Vault: ``secret/lucent`` in the engine kv-v2, and transit with a key ``lucent``."""
    secrets: dict[str, dict[str, str]] = {
        "lucent": {"LUCENT_SECRETS_KEYS": f"v2:{generate_master_key()},v1:{generate_master_key()}"}
    }
    transit = _Wrapping()

    def read_secret(name: str, body: dict[str, str]) -> dict[str, Any]:
        return {"data": secrets[name], "metadata": {"version": 1}}

    def new_data_key(name: str, body: dict[str, str]) -> dict[str, Any]:
        wrapped = transit.wrap(os.urandom(32), b"")
        return {"ciphertext": f"vault:v1:{base64.b64encode(wrapped).decode()}"}

    def decrypt(name: str, body: dict[str, str]) -> dict[str, Any]:
        wrapped = base64.b64decode(body["ciphertext"].removeprefix("vault:v1:"))
        return {"plaintext": base64.b64encode(transit.unwrap(wrapped, b"")).decode()}

    routes: dict[tuple[str, str], Callable[[str, dict[str, str]], dict[str, Any]]] = {
        ("GET", "/v1/secret/data/"): read_secret,
        ("POST", "/v1/transit/datakey/wrapped/"): new_data_key,
        ("POST", "/v1/transit/decrypt/"): decrypt,
    }

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            path, _, name = self.path.rpartition("/")
            route = routes.get((self.command, f"{path}/"))
            if self.headers.get("X-Vault-Token") != _VAULT_TOKEN:
                self._send(403, {"errors": ["permission denied"]})
            elif route is None or name != "lucent":
                self._send(404, {"errors": []})
            else:
                try:
                    self._send(200, {"data": route(name, body)})
                except InvalidTag:
                    self._send(400, {"errors": ["cipher: message authentication failed"]})

        do_GET = do_POST = do_PUT = _answer

        def _send(self, status: int, document: dict[str, Any]) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with _serving(server):
        yield {
            "VAULT_ADDR": f"http://127.0.0.1:{server.server_address[1]}",
            "VAULT_TOKEN": _VAULT_TOKEN,
        }


# -- Google Cloud ----------------------------------------------------------------------------------


@contextmanager
def google(directory: Path) -> Iterator[dict[str, str]]:
    """Cloud KMS over gRPC and TLS, behind a proxy that takes its host's name for this machine.

    gRPC reads its root certificates once in a process, so this works once in a process.
    """
    private_key, certificate = _certificate(_GOOGLE_HOST)
    roots = directory / "roots.pem"
    roots.write_bytes(certificate)
    account = directory / "account.json"
    account.write_text(json.dumps(_service_account()))

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((_cloud_kms(),))
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(private_key, certificate)])
    )
    server.start()

    class Proxy(StreamRequestHandler):
        def handle(self) -> None:
            assert self.rfile.readline().startswith(f"CONNECT {_GOOGLE_HOST}:443 ".encode())
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                back = threading.Thread(target=_pump, args=(upstream, self.connection))
                back.start()
                _pump(self.connection, upstream)
                with suppress(OSError):
                    upstream.shutdown(socket.SHUT_RDWR)
                back.join()

    class ProxyServer(ThreadingTCPServer):
        daemon_threads = True  # a client may keep its connection for as long as the process lives

    proxy = ProxyServer(("127.0.0.1", 0), Proxy)
    with _serving(proxy):
        yield {
            "GOOGLE_APPLICATION_CREDENTIALS": str(account),
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(roots),
            "grpc_proxy": f"http://127.0.0.1:{proxy.server_address[1]}",
            "no_grpc_proxy": "",
            "GRPC_VERBOSITY": "NONE",
        }
        server.stop(None).wait()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)


def _cloud_kms() -> grpc.GenericRpcHandler:
    wrapping = _Wrapping()

    def encrypt(
        request: kms_types.EncryptRequest, context: grpc.ServicerContext
    ) -> kms_types.EncryptResponse:
        wrapped = wrapping.wrap(request.plaintext, request.additional_authenticated_data)
        return kms_types.EncryptResponse(name=request.name, ciphertext=wrapped)

    def decrypt(
        request: kms_types.DecryptRequest, context: grpc.ServicerContext
    ) -> kms_types.DecryptResponse:
        try:
            key = wrapping.unwrap(request.ciphertext, request.additional_authenticated_data)
        except InvalidTag:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Decryption failed")
        return kms_types.DecryptResponse(plaintext=key)

    return grpc.method_handlers_generic_handler(
        "google.cloud.kms.v1.KeyManagementService",
        {
            "Encrypt": grpc.unary_unary_rpc_method_handler(
                encrypt, kms_types.EncryptRequest.deserialize, kms_types.EncryptResponse.serialize
            ),
            "Decrypt": grpc.unary_unary_rpc_method_handler(
                decrypt, kms_types.DecryptRequest.deserialize, kms_types.DecryptResponse.serialize
            ),
        },
    )


def _certificate(host: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = dt.datetime.now(dt.UTC)
    day = dt.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _service_account() -> dict[str, str]:
    """An account whose client signs its own tokens, and so asks nobody for one."""
    return {
        "type": "service_account",
        "project_id": "example",
        "private_key_id": "1",
        "private_key": _pem(rsa.generate_private_key(65_537, 2_048)).decode(),
        "client_email": "app@example.iam.gserviceaccount.com",
        "token_uri": "https://127.0.0.1:1/token",
    }
