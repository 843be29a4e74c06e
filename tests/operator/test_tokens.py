"""Progress tokens that are checked by their signature: real keys, and claims as the API server writes them."""

import base64
import hmac
import json
import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_operator.errors import ApiError
from kubetune_operator.tokens import ISSUER_PATH, KEYS_PATH, REFRESH_SECONDS, TokenVerifier

ISSUER = "https://kubernetes.default.svc"
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
CURVE = ec.generate_private_key(ec.SECP256R1())


def public(key, name, algorithm="RS256"):
    kind = jwt.algorithms.RSAAlgorithm if algorithm == "RS256" else jwt.algorithms.ECAlgorithm
    return {**json.loads(kind.to_jwk(key.public_key())), "kid": name, "alg": algorithm, "use": "sig"}


class ApiServer:
    """Shows its keys, and counts who asks."""

    def __init__(self, *keys):
        self.keys = list(keys)
        self.asked = []
        self.refuses = False

    async def request(self, method, path):
        self.asked.append(path)
        if self.refuses:
            raise ApiError(403, f"forbidden: cannot get path {path}")
        return {ISSUER_PATH: {"issuer": ISSUER}, KEYS_PATH: {"keys": self.keys}}[path]


@pytest.fixture
def server():
    return ApiServer(public(KEY, "one"))


def claims(**changes):
    now = int(time.time())
    told = {
        "aud": [TOKEN_AUDIENCE],
        "iss": ISSUER,
        "sub": "system:serviceaccount:team:default",
        "iat": now,
        "nbf": now,
        "exp": now + 3600,
        "kubernetes.io": {
            "namespace": "team",
            "pod": {"name": "bot-a1-0-x", "uid": "u1"},
            "serviceaccount": {"name": "default", "uid": "a1"},
        },
        **changes,
    }
    return {name: value for name, value in told.items() if value is not None}


def token(key=KEY, name="one", algorithm="RS256", **changes):
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers={"kid": name})


async def test_a_token_tells_the_pod_that_it_was_made_for(server):
    assert tuple(await TokenVerifier(server).identify(token())) == ("team", "bot-a1-0-x", "u1")


async def test_keys_on_a_curve_are_known_too(server):
    server.keys.append(public(CURVE, "curve", "ES256"))
    assert await TokenVerifier(server).identify(token(CURVE, "curve", "ES256")) is not None


def unsigned():
    return jwt.encode(claims(), None, algorithm="none", headers={"kid": "one"})


def signed_with_the_public_key():
    """The oldest trick: the public key is taken for a shared secret."""
    secret = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head, body = (part(json.dumps(of).encode()) for of in ({"alg": "HS256", "kid": "one"}, claims()))
    return f"{head}.{body}.{part(hmac.digest(secret, f'{head}.{body}'.encode(), 'sha256'))}"


def part(content):
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


LATE = {"iat": 0, "nbf": 0, "exp": 60}
REFUSED = {
    "no token at all": lambda: "secret",
    "no text of a token": lambda: "a.b.c",
    "another cluster's key": lambda: token(OTHER),
    "another cluster's key under a name of its own": lambda: token(OTHER, "other"),
    "no signature": unsigned,
    "a signature with a shared secret": signed_with_the_public_key,
    "an end in the past": lambda: token(**LATE),
    "a beginning in the future": lambda: token(nbf=int(time.time()) + 600),
    "no end": lambda: token(exp=None),
    "somebody else as its audience": lambda: token(aud=[ISSUER]),
    "no audience": lambda: token(aud=None),
    "another issuer": lambda: token(iss="https://elsewhere"),
    "an account without a pod": lambda: token(**{"kubernetes.io": {"namespace": "team"}}),
    "a node's name": lambda: token(sub="system:node:node-0"),
    "an account of another namespace": lambda: token(sub="system:serviceaccount:other:default"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_it_is_no_progress_token_with(server, case):
    assert await TokenVerifier(server).identify(REFUSED[case]()) is None


async def test_the_keys_are_read_once(server):
    verifier = TokenVerifier(server)
    for _ in range(3):
        assert await verifier.identify(token()) is not None
    assert server.asked == [ISSUER_PATH, KEYS_PATH]


async def test_a_key_that_the_cluster_takes_into_use_is_learned(server):
    now = 0.0
    verifier = TokenVerifier(server, lambda: now)
    await verifier.identify(token())
    server.keys = [public(OTHER, "two")]
    assert await verifier.identify(token(OTHER, "two")) is None  # too soon to ask again
    now = REFRESH_SECONDS
    assert await verifier.identify(token(OTHER, "two")) is not None
    assert await verifier.identify(token()) is None  # and one that it has dropped is forgotten


async def test_names_of_keys_that_are_made_up_cost_no_requests(server):
    verifier = TokenVerifier(server)
    for number in range(9):
        assert await verifier.identify(token(OTHER, f"guess-{number}")) is None
    assert server.asked == [ISSUER_PATH, KEYS_PATH]


async def test_a_server_that_shows_no_keys_is_an_error_and_not_a_wrong_token(server):
    server.refuses = True
    verifier = TokenVerifier(server)
    for _ in range(2):
        with pytest.raises(ApiError, match="403"):
            await verifier.identify(token())
    assert server.asked == [ISSUER_PATH]  # nor is it asked for every report
