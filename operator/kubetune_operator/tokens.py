"""Whose a progress token is, without asking for a review of it: by its signature, as any OpenID client does.

A TokenReview takes a right on the whole cluster. The keys with which the cluster signs its service accounts' tokens are
public to every service account instead. A token that was verified so may belong to a pod that is gone: the caller
compares the pod with those that it knows.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_operator.connection import Connection
from kubetune_operator.errors import OperatorError

if TYPE_CHECKING:  # 10 MiB that an operator with TokenReviews does without
    import jwt

ISSUER_PATH: Final = "/.well-known/openid-configuration"
KEYS_PATH: Final = "/openid/v1/jwks"
REFRESH_SECONDS: Final = 60.0
"""Least time between two readings of the keys: tokens with made-up key names must not cost requests."""
LEEWAY_SECONDS: Final = 10
"""By which the clocks of the cluster's machines may differ."""
ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
"""Of a private and a public key, all of them: none that takes the public key for a secret."""


class PodIdentity(NamedTuple):
    """The pod that a token was made for."""

    namespace: str
    pod: str
    uid: str


class TokenVerifier:
    """Verifies tokens with the cluster's own keys, which it reads anew when a token names one that it does not know."""

    def __init__(self, connection: Connection, clock: Callable[[], float] = time.monotonic) -> None:
        self._connection = connection
        self._clock = clock
        self._issuer = ""
        self._keys: dict[str, jwt.PyJWK] = {}
        self._due = 0.0
        self._failure: OperatorError | None = None

    async def refresh(self) -> None:
        """Read issuer and keys. Raises OperatorError if the API server does not show them."""
        import jwt

        self._due = self._clock() + REFRESH_SECONDS
        try:
            self._issuer = (await self._connection.request("GET", ISSUER_PATH))["issuer"]
            found = jwt.PyJWKSet.from_dict(await self._connection.request("GET", KEYS_PATH))
        except OperatorError as error:
            self._failure = error
            raise
        self._failure = None
        self._keys = {key.key_id: key for key in found.keys if key.key_id is not None}

    async def identify(self, token: str) -> PodIdentity | None:
        """The pod that the progress token was made for; None if it is no such token.

        Raises OperatorError if the keys cannot be read.
        """
        import jwt

        try:
            name = jwt.get_unverified_header(token).get("kid", "")
        except jwt.InvalidTokenError:
            return None
        if name not in self._keys and self._clock() >= self._due:
            await self.refresh()
        key = self._keys.get(name)
        if key is None and self._failure is not None:
            raise self._failure
        return None if key is None else _identity(token, key, self._issuer)


def _identity(token: str, key: "jwt.PyJWK", issuer: str) -> PodIdentity | None:
    import jwt

    try:
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=ALGORITHMS,
            audience=TOKEN_AUDIENCE,
            issuer=issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "iat", "nbf", "aud", "iss", "sub"]},
        )
    except jwt.InvalidTokenError:
        return None
    bound = claims.get("kubernetes.io") or {}
    namespace, pod = bound.get("namespace") or "", bound.get("pod") or {}
    is_account = claims["sub"].startswith(f"system:serviceaccount:{namespace}:")
    if not namespace or not is_account or not pod.get("name") or not pod.get("uid"):
        return None
    return PodIdentity(namespace, pod["name"], pod["uid"])
