"""A fault of the manifest that only the API server finds, when a Job is created: its words, with our fields. Pure.

The operator keeps parts of Kubernetes' own API as they stand (podspec.py). They reach the API server as
`spec.template.spec....` of a Job that the user has never seen.
"""

import re
from typing import Final

_FAULT: Final = re.compile(
    r'^(?:Job in version "[^"]*" cannot be handled as a Job: (?:strict decoding error: |json: )?'
    r'|Job\.batch "[^"]*" is invalid: (?=.*spec\.template)'
    r"|failed to create typed patch object \([^)]*\): \.?)(?P<problems>.*)$",
    re.DOTALL,
)
_FIELDS: Final = re.compile(r"\bspec\.template\.(?:spec\.containers\[0\]|spec|metadata)\.")
"""What the user wrote comes first in each list, so that indices are the manifest's too."""


def fault(words: str) -> str | None:
    """What is wrong with the manifest, if the API server refused a Job for its content, not for its circumstances."""
    found = _FAULT.match(words)
    if found is None or "field is immutable" in words:
        return None
    problems = _FIELDS.sub("spec.workers.", found["problems"]).strip()
    return problems.removeprefix("[").removesuffix("]") if problems.startswith("[") else problems
