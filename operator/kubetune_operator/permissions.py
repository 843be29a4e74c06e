"""What a FineTuneJob may ask for only where an administrator allows it. Pure.

Whoever may create FineTuneJobs shall gain nothing by it but such pods in the same namespace: no account, no network and
no capability that the operator's settings do not name.
"""

from collections.abc import Iterator
from typing import Final

from kubetune_operator.api import FineTuneJob
from kubetune_operator.settings import Settings, variable

ALL: Final = "*"


def refusals(job: FineTuneJob, settings: Settings) -> Iterator[str]:
    """One sentence for each thing that the job asks for and the settings do not allow."""
    workers = job.spec.workers
    account, allowed = workers.service_account_name, settings.allow_service_accounts
    if account is not None and not {account, ALL} & set(allowed):
        yield _refusal("serviceAccountName", f"ServiceAccount {account} is", "allow_service_accounts")
    if workers.host_network and not settings.allow_host_network:
        yield _refusal("hostNetwork", "the nodes' own network is", "allow_host_network")
    if workers.rdma and not settings.allow_rdma:
        yield _refusal("rdma", "the capability IPC_LOCK is", "allow_rdma")


def _refusal(field: str, what: str, setting: str) -> str:
    return (
        f"spec.workers.{field}: {what} not allowed by the operator's setting {variable(setting)}: "
        "take it out, or ask who installed the operator to allow it"
    )
