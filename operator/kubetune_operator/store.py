"""The FineTuneJobs that this operator handles, as they were last seen."""

from collections.abc import Iterator
from typing import Any, Final

from kubetune_operator.names import OPERATOR_LABEL
from kubetune_operator.settings import OPERATOR_NAME
from kubetune_operator.watch import version

Manifest = dict[str, Any]

BURIED: Final = 10000


def key_of(body: Manifest) -> str:
    """namespace/name."""
    return f"{body['metadata']['namespace']}/{body['metadata']['name']}"


class Store:
    """The newest known body of every FineTuneJob that this operator handles."""

    def __init__(self, operator: str = OPERATOR_NAME) -> None:
        self._operator = operator
        self._bodies: dict[str, Manifest] = {}
        self._buried: dict[str, None] = {}
        """The last uids that are known to be gone: an answer that was long under way must not bring them back."""

    def __len__(self) -> int:
        return len(self._bodies)

    def get(self, key: str) -> Manifest | None:
        """The body; None if there is no such FineTuneJob."""
        return self._bodies.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bodies)

    def offer(self, body: Manifest) -> bool:
        """Take a body unless a newer one is known; whether that changed anything."""
        if body["metadata"].get("labels", {}).get(OPERATOR_LABEL, OPERATOR_NAME) != self._operator:
            return self.remove(key_of(body))
        known = self._bodies.get(key_of(body))
        if body["metadata"]["uid"] in self._buried or (known is not None and version(known) >= version(body)):
            return False
        metadata = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
        self._bodies[key_of(body)] = {**body, "metadata": metadata}  # who wrote what is half of it
        return True

    def remove(self, key: str, uid: str | None = None) -> bool:
        """Forget a FineTuneJob, if it is the one with that uid; whether it was."""
        known = self._bodies.get(key)
        if known is None or (uid is not None and known["metadata"]["uid"] != uid):
            return False
        del self._bodies[key]
        return True

    def bury(self, body: Manifest) -> bool:
        """Forget a FineTuneJob that was deleted, for good; whether it was known."""
        self._buried[body["metadata"]["uid"]] = None
        if len(self._buried) > BURIED:
            del self._buried[next(iter(self._buried))]
        return self.remove(key_of(body), body["metadata"]["uid"])

    def statuses(self) -> list[Manifest]:
        """The status of every FineTuneJob; empty of one that has none yet."""
        return [body.get("status") or {} for body in self._bodies.values()]

    def trainings(self) -> set[str]:
        """The keys of those whose workers run, or start to."""
        states = {key: (body.get("status") or {}).get("state") for key, body in self._bodies.items()}
        return {key for key, state in states.items() if state in ("Starting", "Running")}

    def needs_staging(self, namespace: str, owner: Manifest) -> bool:
        """Whether the owner of a staging Job still waits for it."""
        body = self._bodies.get(f"{namespace}/{owner['name']}")
        if body is None or body["metadata"]["uid"] != owner["uid"] or body["spec"].get("suspend"):
            return False
        conditions = (body.get("status") or {}).get("conditions") or []
        over = {condition["type"] for condition in conditions if condition["status"] == "True"}
        return not over & {"Staged", "Succeeded", "Failed"}
