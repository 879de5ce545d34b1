"""The identity of a merge inside vLLM: a name, a path and an id, all made from its digest.

vLLM keys its prefix cache by name and path, its slots by id, and metric labels by name.  All three contain a
digest of the rule, the weights and the content of every source, so that other content has another identity.
The name contains no text that a client sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import parse_qs, urlencode

from merged_lora.errors import SpecError
from merged_lora.spec import MergeSpec, parse

SCHEME = "merged-lora:"
FIRST_ID = 1 << 30  # vLLM counts its own ids up from 1, and stores ids in 32 signed bits
NUMBER_TAKEN = "this merge's id is taken by another merge; change the last digit of a weight"
_CONTENT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class MergeIdentity:
    """A merge of sources with known content.

    spec:     the merge.
    contents: content digest of each source of the spec, in its order.
    """

    spec: MergeSpec
    contents: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal characters, different for every merge."""
        return self.spec.digest(dict(zip(self.spec.names, self.contents, strict=True)))

    @property
    def name(self) -> str:
        """The adapter name that vLLM uses for it."""
        return SCHEME + self.digest

    @property
    def number(self) -> int:
        """The adapter id: the same in every process, from 2^30 up to below 2^31."""
        return FIRST_ID + int(self.digest, 16) % FIRST_ID

    @property
    def path(self) -> str:
        """A URI that holds everything a worker needs besides the sources' content."""
        return f"{self.name}?{urlencode({'spec': str(self.spec), 'contents': ','.join(self.contents)})}"

    @classmethod
    def from_path(cls, path: str) -> MergeIdentity:
        """The merge of such a URI; raises SpecError if the text is none."""
        name, _, query = path.partition("?")
        fields = parse_qs(query)
        if not is_merge_path(path) or set(fields) != {"spec", "contents"}:
            raise SpecError(f"{path[:64]!r} is not the path of a merge")
        spec = parse(fields["spec"][0])
        contents = tuple(fields["contents"][0].split(","))
        if len(contents) != len(spec.names) or not all(map(_CONTENT.fullmatch, contents)):
            raise SpecError(f"{path[:64]!r} does not name the content of every source")
        identity = cls(spec, contents)
        if identity.name != name:
            raise SpecError(f"{path[:64]!r} has a digest that does not match its content")
        return identity


def is_merge_path(path: str) -> bool:
    """Whether an adapter's path is the path of a merge."""
    return path.startswith(SCHEME)
